package blockdev

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// makeSlots makes a file in memory with n slots, which are zero, and maps it. Nobody can change its
// length, which would be a fault for who has it mapped.
func makeSlots(n int) (f *os.File, slots []slot, unmap func() error, err error) {
	const name, flags = "nbd ledger", unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, nil, nil, os.NewSyscallError("memfd_create", err)
	}
	f = os.NewFile(uintptr(fd), name)
	if slots, unmap, err = mapSlots(fd, n); err != nil {
		f.Close()
		return nil, nil, nil, err
	}
	return f, slots, unmap, nil
}

func mapSlots(fd, n int) (slots []slot, unmap func() error, err error) {
	size := int64(n) * slotSize
	// Allocated now, it can't be lacking later.
	if err := unix.Fallocate(fd, 0, 0, size); err != nil {
		return nil, nil, os.NewSyscallError("fallocate", err)
	}
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	p, err := unix.MmapPtr(fd, 0, nil, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, os.NewSyscallError("mmap", err)
	}
	unmap = func() error { return unix.MunmapPtr(p, uintptr(size)) }
	return (*[maxSlots]slot)(p)[:n:n], unmap, nil
}

// copyFile returns another descriptor of a file.
func copyFile(f syscall.Conn) (c *os.File, err error) {
	err = control(f, func(fd int) error {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			c = os.NewFile(uintptr(n), "copy")
		}
		return err
	})
	return c, err
}

// hungUp reports whether a connection has been shut down by the other end, as the kernel does when
// it takes it for dead, or has failed. What was sent before may still be there to be received.
func hungUp(socket syscall.Conn) (hung bool, err error) {
	err = control(socket, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			n, err := unix.Poll(p, 0)
			if err == unix.EINTR {
				continue
			}
			hung = n > 0
			return err
		}
	})
	return hung, err
}
