package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// The locks are open-file-description locks (fcntl(2), F_OFD_SETLK). Like flock
// they last as long as the open file and are inherited with it, so that a lock can
// be handed to another process. Unlike flock they can be asked about without being
// taken: to list never disturbs a process that is just starting. Nor can a reader
// of the file take them.

// lockTry takes the lock of the file at path, which exists. The file is closed
// to let it go.
func lockTry(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := lock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Removed between the open and the lock: whoever removed it held it.
	if st, err := f.Stat(); err != nil || st.Sys().(*syscall.Stat_t).Nlink == 0 {
		return nil, errors.Join(&fs.PathError{Op: "lock", Path: path, Err: fs.ErrNotExist}, f.Close())
	}
	return f, nil
}

// lockWait is lockTry that waits for the holder to let go.
func lockWait(ctx context.Context, path string) (*os.File, error) {
	return retry(ctx, func() (*os.File, error) { return lockTry(path) })
}

// lock takes the lock of f, or answers errLocked.
func lock(f *os.File) error {
	err := withDescriptor(f, func(fd uintptr) error {
		return unix.FcntlFlock(fd, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return errLocked
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// lockHeld tells whether somebody holds the lock of the file at path. It asks as a
// reader would: who may read the file may ask.
func lockHeld(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	query := unix.Flock_t{Type: unix.F_RDLCK}
	err = withDescriptor(f, func(fd uintptr) error {
		return unix.FcntlFlock(fd, unix.F_OFD_GETLK, &query)
	})
	if err != nil {
		return false, fmt.Errorf("lock %s: %w", path, err)
	}
	return query.Type != unix.F_UNLCK, nil
}

// withDescriptor calls do with f's descriptor, which stays valid meanwhile.
func withDescriptor(f *os.File, do func(fd uintptr) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = do(fd) }); err != nil {
		return err
	}
	return inner
}
