package server

import "golang.org/x/sys/unix"

// hungUp reports whether both directions of a socket are shut down (unix_poll, tcp_poll).
func hungUp(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	for {
		if _, err := unix.Poll(p, 0); err != unix.EINTR {
			return p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		}
	}
}
