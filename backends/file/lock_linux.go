package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// These bytes of an image stand for what programs do with it: qemu locks byte
// 100+n, shared, when it makes use of permission n, and byte 200+n when it grants
// permission n to nobody else; then it looks for a conflict. They need not exist.
// (block/file-posix.c and the permissions of block-common.h in qemu.)
const (
	usesRead     = 100
	usesWrite    = 101
	usesResize   = 103
	deniesWrite  = 201
	deniesResize = 203
)

// lock locks a regular file. The locks belong to the open file description: unlike
// the POSIX kind, they neither vanish when this process closes another descriptor
// of the file, nor stay behind when a child process takes over. Unlike flock, they
// conflict with qemu's.
//
// A writer takes the whole range for itself. A reader does what a qemu that reads
// would do, so that it gets on with other readers, of both kinds.
func (f *File) lock(readOnly bool) error {
	if !readOnly {
		return f.lockRange(unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0)
	}
	for _, b := range []int64{usesRead, deniesWrite, deniesResize} {
		if err := f.lockRange(unix.F_OFD_SETLK, unix.F_RDLCK, b, 1); err != nil {
			return err
		}
	}
	for _, b := range []int64{usesWrite, usesResize} {
		if err := f.lockRange(unix.F_OFD_GETLK, unix.F_WRLCK, b, 1); err != nil {
			return err
		}
	}
	return nil
}

// lockRange locks n bytes at off (n = 0: to the end of all files), or with
// F_OFD_GETLK finds out whether that would work.
func (f *File) lockRange(cmd int, kind int16, off, n int64) error {
	l := unix.Flock_t{Type: kind, Start: off, Len: n}
	err := f.control(func(fd int) error { return setLock(uintptr(fd), cmd, &l) })
	conflict := err == unix.EAGAIN || err == unix.EACCES
	if err == nil && cmd == unix.F_OFD_GETLK {
		conflict = l.Type != unix.F_UNLCK
	}
	switch {
	case conflict:
		return &LockedError{Path: f.path, Holders: f.lockers()}
	case hasNoLocks(err):
		return &NoLocksError{Path: f.path, Err: err}
	case err != nil:
		return fmt.Errorf("file: %s: lock: %w", f.path, err)
	}
	return nil
}

// setLock is fcntl, but in tests.
var setLock = unix.FcntlFlock

// hasNoLocks reports whether an error of locking says that there are no locks of that
// kind: ENOLCK of NFS without a lock manager, ENOSYS of Lustre without -o flock, EINVAL
// of sandboxes that do not know those of open file descriptions.
func hasNoLocks(err error) bool {
	return err == unix.ENOLCK || err == unix.EINVAL || errors.Is(err, errors.ErrUnsupported)
}

// lockers finds the other processes with a lock on the file. The kernel's list of
// locks, /proc/locks, knows no owner of this kind, but what /proc says of a
// descriptor includes its locks. Asking the descriptors' files themselves could
// take for ever: some may be on a network file system that is gone.
func (f *File) lockers() []Holder {
	var st unix.Stat_t
	if err := f.control(func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return nil
	}
	var own string // which may have got some of the locks by now
	f.raw.Control(func(fd uintptr) { own = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) })
	dev := uint64(st.Dev)
	// As in lock_get_status of fs/locks.c.
	inode := fmt.Sprintf(" %02x:%02x:%d ", unix.Major(dev), unix.Minor(dev), st.Ino)
	return holders(func(fd string) bool {
		if fd == own {
			return false
		}
		info, _ := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
		for line := range strings.Lines(string(info)) {
			if strings.HasPrefix(line, "lock:") && strings.Contains(line, inode) {
				return true
			}
		}
		return false
	})
}

// openers finds the processes that have the block device open.
func openers(dev os.FileInfo) []Holder {
	rdev := dev.Sys().(*syscall.Stat_t).Rdev
	return holders(func(fd string) bool {
		if to, err := os.Readlink(fd); err != nil || !strings.HasPrefix(to, "/dev/") {
			return false
		}
		st, err := os.Stat(fd)
		return err == nil && isBlock(st.Mode()) && st.Sys().(*syscall.Stat_t).Rdev == rdev
	})
}

// holders finds the processes with a descriptor, given by its path in /proc, that
// matches, as far as this process may look.
func holders(match func(fd string) bool) []Holder {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	var found []Holder
	for _, fd := range fds {
		dir := filepath.Dir(filepath.Dir(fd))
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || len(found) > 0 && found[len(found)-1].PID == pid || !match(fd) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
		found = append(found, Holder{PID: pid, Comm: strings.TrimSpace(string(comm))})
	}
	return found
}
