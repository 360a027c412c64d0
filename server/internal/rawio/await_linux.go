package rawio

import "golang.org/x/sys/unix"

// await waits until there is something to receive from a socket, of which it receives nothing.
func (c *portable) await(l Lender) error {
	if c.raw == nil {
		l.Park(false)
		return nil
	}
	if c.try == nil {
		c.try = c.tryAwait // made once, for it is an allocation
	}
	c.wait = l
	err := c.raw.Read(c.try)
	c.wait = nil
	if err == nil {
		l.Lend() // The wait is over.
	}
	return err
}

// tryAwait reports whether there is anything to receive, or an error, or the end.
func (c *portable) tryAwait(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		switch {
		case err == unix.EINTR:
		case err == nil && n == 0:
			c.wait.Park(true)
			return false
		default:
			return true
		}
	}
}
