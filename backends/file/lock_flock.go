//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package file

import (
	"errors"
	"fmt"
	"syscall"
)

// lock locks a regular file with flock.
func (f *File) lock(readOnly bool) error {
	how := syscall.LOCK_EX
	if readOnly {
		how = syscall.LOCK_SH
	}
	var err error
	closed := f.raw.Control(func(fd uintptr) {
		err = syscall.Flock(int(fd), how|syscall.LOCK_NB)
	})
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK):
		return &LockedError{Path: f.path}
	case errors.Is(err, syscall.ENOLCK), errors.Is(err, errors.ErrUnsupported):
		return &NoLocksError{Path: f.path, Err: err}
	case err != nil || closed != nil:
		return fmt.Errorf("file: %s: lock: %w", f.path, errors.Join(err, closed))
	}
	return nil
}
