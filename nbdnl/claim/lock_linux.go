package claim

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// tryLock takes the exclusive lock on f, unless another open file has it.
func tryLock(f *os.File) (bool, error) { return flock(f, unix.LOCK_EX) }

// lockedByOther reports whether another open file has the exclusive lock on f. It takes a shared
// one, until f is closed: flock(2) has no way to ask.
func lockedByOther(f *os.File) (bool, error) {
	shared, err := flock(f, unix.LOCK_SH)
	return !shared && err == nil, err
}

// flock takes a lock on f, unless a lock that another open file has forbids it.
func flock(f *os.File, how int) (bool, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	var lockErr error
	if err := raw.Control(func(fd uintptr) {
		lockErr = unix.Flock(int(fd), how|unix.LOCK_NB)
	}); err != nil {
		return false, err
	}
	if errors.Is(lockErr, unix.EWOULDBLOCK) || errors.Is(lockErr, unix.EINTR) {
		return false, nil
	}
	return lockErr == nil, os.NewSyscallError("flock", lockErr)
}

// duplicate returns another descriptor of the open file f, with that name. It has the same lock.
func duplicate(f *os.File, name string) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	return os.NewFile(uintptr(fd), name), nil
}
