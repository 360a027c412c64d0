package rawio

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// portableWindow holds what Recv takes at a time, behind the longest incomplete message that a
// receiver may have lying in front.
const portableWindow = 128 << 10

// portable is a Conn on nothing but the methods of net.Conn.
type portable struct {
	nc   net.Conn
	raw  syscall.RawConn       // of a socket; nil: it is none
	try  func(fd uintptr) bool // tryAwait
	wait Lender                // of await
	vec  net.Buffers           // of the Send that is running: WriteTo wants it to be addressable
	own  net.Buffers           // what vec was, to be used again: WriteTo consumes it

	// first is what Recv waits with, for Read has to have memory in hand. It is passed on before
	// Recv returns.
	first [MinLend]byte
}

func newPortable(nc net.Conn) Conn { return &portable{nc: nc} }

func (c *portable) Recv(l Lender) (int, error) {
	if err := c.await(l); err != nil {
		return 0, err
	}
	n, err := c.nc.Read(c.first[:])
	if n == 0 {
		return 0, err
	}
	if n < len(c.first) {
		l.Drained()
	}
	// An error beside the bytes comes again with the next call.
	return copy(l.Lend(), c.first[:n]), nil
}

func (c *portable) ReadFull(p []byte, w Waiter) (int, error) {
	w.Wait()
	return fillFrom(c.nc, p)
}

func (c *portable) Send(v *Vec, more bool) (n int, err error) {
	defer func() {
		c.vec = nil
		clear(c.own)
		// A connection that does more than system calls looks at the memory itself.
		if fault := memoryFault(recover()); fault != nil {
			n, err = -1, fmt.Errorf("write: %w", fault)
		}
	}()
	c.own = append(c.own[:0], v.Bufs...)
	c.vec = c.own
	sent, err := c.vec.WriteTo(c.nc)
	return int(sent), err
}

func (c *portable) SendPages(*Pages) error { return errors.ErrUnsupported }

func (c *portable) SendsPages() bool { return false }

func (c *portable) Window() int { return portableWindow }
func (c *portable) Direct() int { return portableWindow / 2 }
