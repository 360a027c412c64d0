package file

import (
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
	err := f.control(func(fd int) error { return unix.FcntlFlock(uintptr(fd), cmd, &l) })
	conflict := err == unix.EAGAIN || err == unix.EACCES
	if err == nil && cmd == unix.F_OFD_GETLK {
		conflict = l.Type != unix.F_UNLCK
	}
	switch {
	case conflict:
		return &LockedError{Path: f.path, Holders: f.lockers()}
	case err != nil:
		return fmt.Errorf("file: %s: lock: %w", f.path, err)
	}
	return nil
}

// lockers finds the processes that have a lock on the file. The kernel's list of
// locks, /proc/locks, knows no owner of this kind, but each descriptor tells.
func (f *File) lockers() []Holder {
	st, err := f.f.Stat()
	if err != nil {
		return nil
	}
	return holders(func(fd string, other os.FileInfo) bool {
		if !os.SameFile(st, other) {
			return false
		}
		info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
		return err == nil && strings.Contains(string(info), "\nlock:")
	})
}

// openers finds the processes that have the block device open.
func openers(st os.FileInfo) []Holder {
	rdev := st.Sys().(*syscall.Stat_t).Rdev
	return holders(func(_ string, other os.FileInfo) bool {
		o, ok := other.Sys().(*syscall.Stat_t)
		return ok && isBlock(other.Mode()) && o.Rdev == rdev
	})
}

// holders finds the processes with a descriptor, given by its path in /proc, that
// matches, as far as this process may look.
func holders(match func(fd string, st os.FileInfo) bool) []Holder {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	var found []Holder
	for _, fd := range fds {
		dir := strings.SplitN(fd, "/", 4)[2]
		pid, err := strconv.Atoi(dir)
		if err != nil || len(found) > 0 && found[len(found)-1].PID == pid {
			continue
		}
		if st, err := os.Stat(fd); err != nil || !match(fd, st) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join("/proc", dir, "comm"))
		found = append(found, Holder{PID: pid, Comm: strings.TrimSpace(string(comm))})
	}
	return found
}
