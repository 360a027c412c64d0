//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A memfd is an unnamed file in memory. A nil one is closed.
type memfd struct {
	*os.File
	raw syscall.RawConn
}

// createMemfd makes a memfd. Kernels from 6.3 on want to hear that it is not for
// execution, and may insist; older ones do not know the flag.
func createMemfd() (*memfd, error) {
	fd, err := unix.MemfdCreate("nbdctl", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("nbdctl", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:nbdctl")
	// A file that another holder of it made shorter would kill who touches the
	// lost part of a mapping.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		return nil, errors.Join(fmt.Errorf("seal: %w", err), f.Close())
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &memfd{File: f, raw: raw}, nil
}

// truncate makes the file as long as that, if it is shorter.
func (f *memfd) truncate(size int64) error {
	st, err := f.Stat()
	if err != nil || st.Size() >= size {
		return err
	}
	return f.Truncate(size)
}

// fallocate is fallocate(2), with every lack of memory as ENOSPC.
func (f *memfd) fallocate(mode uint32, off, n int64) error {
	var err error
	closed := f.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Fallocate(int(fd), mode, off, n)
		}
	})
	switch {
	case closed != nil:
		return fs.ErrClosed
	case err == unix.ENOMEM:
		err = unix.ENOSPC
	}
	if err != nil {
		return fmt.Errorf("fallocate: %w", err)
	}
	return nil
}

// mmap maps a part of the file.
func (f *memfd) mmap(off, n int64) (p []byte, err error) {
	closed := f.raw.Control(func(fd uintptr) {
		p, err = unix.Mmap(int(fd), off, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	})
	return p, errors.Join(closed, err)
}

func (f *memfd) close() error {
	if f == nil {
		return nil
	}
	return f.Close()
}
