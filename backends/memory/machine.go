package memory

import (
	"bytes"
	"io/fs"
	"math"
	"os"
	"path"
	"strconv"
)

const (
	// The reserve of a machine (or cgroup) is a sixteenth of its memory, in these
	// bounds. It is what this process needs to serve the device with, what other
	// programs take between two readings, and what keeps the kernel from
	// thrashing before it is full.
	minReserve = 32 << 20
	maxReserve = 1 << 30
)

// A machine tells how much memory it has, by the files of a Linux system.
type machine struct{ root fs.FS }

func hostMachine() machine { return machine{os.DirFS("/")} }

// spare returns how many bytes can be taken, without swapping and without
// breaking into the reserve: the least of what the machine and each memory cgroup
// around this process have. It may be negative. Not ok: this is no Linux, or
// /proc is not mounted.
func (m machine) spare() (n int64, ok bool) {
	info, err := fs.ReadFile(m.root, "proc/meminfo")
	if err != nil {
		return 0, false
	}
	total, ok1 := field(info, "MemTotal:")
	available, ok2 := field(info, "MemAvailable:")
	if !ok1 || !ok2 {
		return 0, false
	}
	n = available<<10 - reserve(total<<10)
	for dir := m.cgroup(); ; dir = path.Dir(dir) {
		if in, ok := m.spareIn(path.Join("sys/fs/cgroup", dir)); ok {
			n = min(n, in)
		}
		if dir == "/" {
			return n, true
		}
	}
}

// cgroup returns the path of this process in the version 2 hierarchy, "/" if it
// has none. In a container it may lie outside of what is mounted; then only the
// levels that are there are read.
func (m machine) cgroup() string {
	b, _ := fs.ReadFile(m.root, "proc/self/cgroup")
	for line := range bytes.Lines(b) {
		if p, ok := bytes.CutPrefix(line, []byte("0::")); ok {
			return path.Join("/", string(bytes.TrimSpace(p)))
		}
	}
	return "/"
}

// spareIn is spare for one cgroup. Not ok: it has no limit.
func (m machine) spareIn(dir string) (n int64, ok bool) {
	limit := int64(math.MaxInt64)
	// Above memory.high the kernel slows the cgroup down to a crawl, so it is as
	// good as the end.
	for _, name := range []string{"memory.max", "memory.high"} {
		if v, ok := m.number(path.Join(dir, name)); ok {
			limit = min(limit, v)
		}
	}
	current, ok := m.number(path.Join(dir, "memory.current"))
	if !ok || limit == math.MaxInt64 {
		return 0, false
	}
	// The page cache is charged too but makes room. A memfd's pages are not among
	// these: the kernel counts them as anonymous.
	stat, _ := fs.ReadFile(m.root, path.Join(dir, "memory.stat"))
	for _, name := range []string{"active_file", "inactive_file", "slab_reclaimable"} {
		v, _ := field(stat, name)
		current -= v
	}
	return limit - max(current, 0) - reserve(limit), true
}

// number reads a file that holds one number. Not ok: there is none; it says "max".
func (m machine) number(name string) (int64, bool) {
	b, err := fs.ReadFile(m.root, name)
	if err != nil {
		return 0, false
	}
	v, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	return v, err == nil && v >= 0 && v <= maxSize
}

// field finds the number after name at the start of a line.
func field(b []byte, name string) (int64, bool) {
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 || string(f[0]) != name {
			continue
		}
		// Anything near the end of the range would overflow in KiB.
		v, err := strconv.ParseInt(string(f[1]), 10, 64)
		return v, err == nil && v >= 0 && v < maxSize>>10
	}
	return 0, false
}

func reserve(total int64) int64 {
	return min(max(total/16, minReserve), maxReserve)
}
