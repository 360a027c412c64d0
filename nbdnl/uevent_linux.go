package nbdnl

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// kernelUevents is the multicast group on which the kernel itself speaks; udevd repeats on another.
const kernelUevents = 1

// openUevents opens the kernel's uevents; it needs no privilege. Each Read returns one message, and
// Close wakes it.
func openUevents() (io.ReadCloser, error) {
	const raw = unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	fd, err := unix.Socket(unix.AF_NETLINK, raw, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// Only the kernel and privileged processes can send to it.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelUevents}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}
