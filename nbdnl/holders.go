package nbdnl

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Holders returns who uses the device or a partition of it: processes that have it open, this one
// included; file systems mounted in any mount namespace that a process is in, swap, and device mapper,
// md and loop devices made of it. Without privilege it finds what the caller may see, and that is no
// error.
//
// The descriptor by which ioctls keep a device connected does not count where the kernel tells whose it
// is, which it does not before Linux 6.1, nor in another pid namespace than the initial one: Client.Holders
// knows its own everywhere.
//
// It does not find a process that has mapped the device and closed the descriptor, nor kernel users
// that leave no trace; most of those show when the device is opened exclusively.
func Holders(index int) ([]Holder, error) { return System{}.Holders(index) }

// Holders is the function Holders for the system.
func (s System) Holders(index int) ([]Holder, error) {
	holders, err := s.holders(index)
	return holders, newError("holders", index, err)
}

// Holders is the function Holders for the Client's system. It knows also which descriptor keeps a device
// connected that this Client has connected by ioctls, on any kernel and in any namespace.
func (c *Client) Holders(index int) ([]Holder, error) {
	holders, err := c.sys.holders(index, c.keeper(index))
	return holders, newError("holders", index, err)
}

// keeper returns the descriptor through which this Client keeps the device connected, if it does.
func (c *Client) keeper(index int) descriptor {
	if !c.driver.serves(index) {
		return descriptor{}
	}
	return descriptor{os.Getpid(), someFD}
}

// A descriptor is one of some process, or with someFD any one, but one only.
type descriptor struct{ pid, fd int }

const someFD = -1

// A search looks for the holders of one device.
type search struct {
	sys  *System
	disk string // its name
	// names are the names of the device and its partitions, by number: "43:96" is "nbd3".
	names map[string]string
	found []Holder
	// except are descriptors that do not count.
	except map[descriptor]bool
}

// holders looks for all holders, but for descriptors that the caller knows of, and for the one without
// which a device that was connected by ioctls would not be.
func (s *System) holders(index int, except ...descriptor) ([]Holder, error) {
	q := search{sys: s, disk: name(index), names: make(map[string]string), except: make(map[descriptor]bool)}
	for _, d := range append(except, s.keeper(index)) {
		q.except[d] = true
	}
	disk := s.block(index)
	partitions, err := filepath.Glob(filepath.Join(disk, name(index)+"p*"))
	if err != nil {
		return nil, err
	}
	for _, dir := range append([]string{disk}, partitions...) {
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		if errors.Is(err, os.ErrNotExist) && dir != disk {
			continue // the partition was removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("there is no such device: %w", err)
		}
		q.names[strings.TrimSpace(string(number))] = filepath.Base(dir)
		q.stacked(dir)
	}
	q.loops()
	q.mounts()
	q.swaps()
	q.processes()
	return q.found, nil
}

// keeper returns the descriptor through which NBD_DO_IT keeps the device connected, if that can be told.
func (s *System) keeper(index int) descriptor {
	fs := newSysfs(s)
	l, err := fs.life(index)
	if err != nil || !l.connected || l.identified || !fs.identifiers {
		return descriptor{}
	}
	pid, _ := s.processOf(l.tid)
	return descriptor{pid, someFD}
}

// add notes a holder, unless it is known.
func (q *search) add(h Holder) {
	if !slices.Contains(q.found, h) {
		q.found = append(q.found, h)
	}
}

// stacked finds the devices that the kernel links to the device or partition with that directory in
// sysfs: device mapper, md and their like.
func (q *search) stacked(dir string) {
	for _, above := range q.list(filepath.Join(dir, "holders")) {
		h := Holder{Kind: HolderDevice, Path: above, Device: filepath.Base(dir)}
		if b, err := os.ReadFile(q.sys.path("sys/block", above, "dm/name")); err == nil {
			h.Path = strings.TrimSpace(string(b))
		}
		q.add(h)
	}
}

// loops finds loop devices, which the kernel does not link to what they are made of.
func (q *search) loops() {
	files, err := filepath.Glob(q.sys.path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if device, ok := q.device(strings.TrimSuffix(string(b), "\n")); ok {
			loop := filepath.Base(filepath.Dir(filepath.Dir(f)))
			q.add(Holder{Kind: HolderDevice, Path: loop, Device: device})
		}
	}
}

// mounts finds mounts in the mount namespaces of all processes.
func (q *search) mounts() {
	seen := make(map[string]bool)
	for _, pid := range q.processIDs() {
		ns, err := os.Readlink(q.sys.path("proc", pid, "ns/mnt"))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		f, err := os.Open(q.sys.path("proc", pid, "mountinfo"))
		if err != nil {
			continue
		}
		for lines := longLines(f); lines.Scan(); {
			q.mount(lines.Text(), pid)
		}
		_ = f.Close() // only read
	}
}

// mount notes the mount that a line of mountinfo describes, as pid sees it.
func (q *search) mount(line, pid string) {
	m, ok := parseMount(line)
	if !ok {
		return
	}
	device, ok := q.names[m.number]
	if !ok && strings.HasPrefix(m.source, "/dev/") {
		// btrfs and its like show a number of their own.
		device, ok = q.device(m.source)
	}
	already := func(h Holder) bool {
		return h.Kind == HolderMount && h.Path == m.point && h.Device == device
	}
	if !ok || slices.ContainsFunc(q.found, already) {
		return
	}
	h := Holder{Kind: HolderMount, Path: m.point, Device: device}
	if pid != self {
		h.PID, h.Comm = q.process(pid)
	}
	q.add(h)
}

// swaps finds swap space.
func (q *search) swaps() {
	f, err := os.Open(q.sys.path("proc/swaps"))
	if err != nil {
		return
	}
	defer f.Close()
	for lines := longLines(f); lines.Scan(); {
		path, _, _ := strings.Cut(lines.Text(), " ")
		path, _, _ = strings.Cut(path, "\t")
		if device, ok := q.device(unescape(path)); ok {
			q.add(Holder{Kind: HolderSwap, Path: unescape(path), Device: device})
		}
	}
}

// processes finds processes that have the device open.
func (q *search) processes() {
	for _, pid := range q.processIDs() {
		if pid == self {
			continue // comes again under its number
		}
		for _, fd := range q.list(q.sys.path("proc", pid, "fd")) {
			path, err := os.Readlink(q.sys.path("proc", pid, "fd", fd))
			if err != nil || !strings.HasPrefix(path, "/") {
				continue // closed, or a socket, a pipe and the like
			}
			number, ok := q.sys.deviceNumber(q.sys.path("proc", pid, "fd", fd))
			device, ours := q.names[number]
			if !ok || !ours || q.isPathOnly(pid, fd) || q.excepted(pid, fd, device) {
				continue
			}
			h := Holder{Kind: HolderProcess, Path: path, Device: device}
			h.PID, h.Comm = q.process(pid)
			q.add(h)
		}
	}
}

// excepted reports whether a descriptor of the device does not count.
func (q *search) excepted(pid, fd, device string) bool {
	p, err1 := strconv.Atoi(pid)
	n, err2 := strconv.Atoi(fd)
	if err1 != nil || err2 != nil {
		return false
	}
	some := descriptor{p, someFD}
	switch {
	case q.except[descriptor{p, n}]:
		return true
	case q.except[some] && device == q.disk:
		delete(q.except, some) // one is enough
		return true
	}
	return false
}

// isPathOnly reports whether a descriptor was opened with O_PATH, which does not open the device.
func (q *search) isPathOnly(pid, fd string) bool {
	const oPath = 0o10000000 // O_PATH, asm-generic/fcntl.h
	b, err := os.ReadFile(q.sys.path("proc", pid, "fdinfo", fd))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), "flags:")
	line, _, _ := strings.Cut(rest, "\n")
	flags, err := strconv.ParseUint(strings.TrimSpace(line), 8, 64)
	return err == nil && flags&oPath != 0
}

// device returns the name of the device, if it is one of those looked for, that a path leads to.
func (q *search) device(path string) (string, bool) {
	number, ok := q.sys.deviceNumber(q.sys.path(path))
	if !ok {
		return "", false
	}
	device, ok := q.names[number]
	return device, ok
}

// self stands for the calling process, whose mount namespace is the first to be looked at.
const self = "self"

// processIDs returns self and the numbers of all processes, ascending.
func (q *search) processIDs() []string {
	var pids []string
	for _, n := range q.list(q.sys.path("proc")) {
		if n[0] >= '1' && n[0] <= '9' {
			pids = append(pids, n)
		}
	}
	slices.SortFunc(pids, func(a, b string) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	return append([]string{self}, pids...)
}

func (q *search) process(pid string) (int, string) {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return 0, ""
	}
	comm, err := os.ReadFile(q.sys.path("proc", pid, "comm"))
	if err != nil {
		return n, "?" // it has exited
	}
	return n, strings.TrimSuffix(string(comm), "\n")
}

// list returns the names in a directory, none if it can't be read.
func (q *search) list(dir string) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1) // those that it returns with an error do
	return names
}

// longLines reads lines of up to a megabyte: overlay mounts list all their layers in one.
func longLines(f *os.File) *bufio.Scanner {
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	return s
}
