package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Below returns the indexes of the nbd devices that store what the process of e
// has open. That may be such a device or a partition of it, what the kernel has
// made of one (device mapper, md, loop devices), or a file in a file system there.
// The device that the process serves is among them if it was connected by ioctls.
func (e *Entry) Below() []int {
	p, err := e.living()
	if err != nil || p == nil {
		return nil // It has nothing open, or nothing that shows.
	}
	defer p.close()
	dir := fmt.Sprintf("/proc/%d/fd", e.PID)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	d := descent{pid: e.PID, seen: make(map[string]bool)}
	for _, fd := range fds {
		if number, ok := storage(filepath.Join(dir, fd.Name())); ok {
			d.from(number)
		}
	}
	return d.indexes
}

// storage returns the number, as in "43:96", of the block device at path, or of
// the one that stores the file there.
func storage(path string) (number string, ok bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", false
	}
	device := uint64(st.Dev)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		device = uint64(st.Rdev)
	case unix.S_IFREG:
	default:
		return "", false
	}
	return fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device)), true
}

// A descent goes from block devices down to what they are made of.
type descent struct {
	pid     int             // a process that sees the mounts
	seen    map[string]bool // by number
	indexes []int           // of nbd devices
}

func (d *descent) from(number string) {
	if d.seen[number] {
		return
	}
	d.seen[number] = true
	dir, err := filepath.EvalSymlinks(filepath.Join("/sys/dev/block", number))
	if err != nil {
		d.mounted(number)
		return
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		dir = filepath.Dir(dir)
	}
	if name := filepath.Base(dir); strings.HasPrefix(name, "nbd") {
		if index, err := nbdnl.ParseIndex(name); err == nil {
			d.indexes = append(d.indexes, index)
		}
		return
	}
	// The kernel links whatever is claimed for good (bd_link_disk_holder), but
	// not what a loop device is made of.
	slaves, err := filepath.Glob(filepath.Join(dir, "slaves/*/dev"))
	if err != nil {
		return
	}
	for _, s := range slaves {
		if b, err := os.ReadFile(s); err == nil {
			d.from(strings.TrimSpace(string(b)))
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "loop/backing_file")); err == nil {
		if number, ok := storage(strings.TrimSuffix(string(b), "\n")); ok {
			d.from(number)
		}
	}
}

// mounted goes on from a file system to the device that was named when it was
// mounted. It is for file systems that show a number of their own, as btrfs does.
func (d *descent) mounted(number string) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", d.pid))
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		head, tail, _ := strings.Cut(line, " - ")
		here, what := strings.Fields(head), strings.Fields(tail)
		if len(here) < 5 || len(what) < 2 || here[2] != number || !strings.HasPrefix(what[1], "/dev/") {
			continue
		}
		if number, ok := storage(what[1]); ok {
			d.from(number)
			return
		}
	}
}
