package nbdnltest

import (
	"encoding/binary"
	"syscall"

	"golang.org/x/sys/unix"
)

// lookupSocket takes a reference of the kernel's own to a socket of the process (nbd_get_socket).
func lookupSocket(n uint32) (int, syscall.Errno) {
	domain, err := unix.GetsockoptInt(int(n), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return 0, errnoOf(err) // EBADF, ENOTSOCK
	}
	typ, err := unix.GetsockoptInt(int(n), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return 0, errnoOf(err)
	}
	known := domain == unix.AF_UNIX || domain == unix.AF_INET || domain == unix.AF_INET6
	if !known || typ != unix.SOCK_STREAM {
		return 0, syscall.EINVAL
	}
	fd, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 0)
	return fd, errnoOf(err)
}

// sendDisc sends NBD_CMD_DISC, as far as the socket has room (send_disconnects).
func sendDisc(fd int) {
	b := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	b = binary.BigEndian.AppendUint32(b, nbdCmdDisc)
	b = append(b, make([]byte, 20)...)
	_ = unix.Sendto(fd, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil) // the peer may have gone
}

// isDead reports whether the other end is closed or shut down.
func isDead(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}

// waitDead returns when the other end is closed or shut down, or this one is.
func waitDead(fd int) {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if _, err := unix.Poll(p, -1); err != unix.EINTR {
			return
		}
	}
}

// threadID returns the calling thread's number.
func threadID() int { return unix.Gettid() }

// limitSends sets sk_sndtimeo, in seconds.
func limitSends(fd int, seconds uint64) {
	tv := unix.NsecToTimeval(int64(seconds) * 1e9)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv) // fails for no socket
}

func shutdown(fd int) { _ = unix.Shutdown(fd, unix.SHUT_RDWR) } // it may be so already

func closeFD(fd int) { _ = unix.Close(fd) } // fails for no descriptor that is open

func errnoOf(err error) syscall.Errno {
	errno, _ := err.(syscall.Errno) // what package unix returns; 0 for nil
	return errno
}
