package server

import (
	"errors"
	"fmt"
	"syscall"
)

// maxKept is the length in bytes up to which a connection with an account may have a payload in
// memory that is not counted there.
const maxKept = 2 << 20

// A payload is the data of one WRITE on their way to a backend that takes them from where they are:
// the inbox, the socket, or first one and then the other. It is the connection's, and implements
// backends.Payload.
type payload struct {
	inbox *inbox
	total int // in bytes
	left  int // not taken yet
	err   error

	// The request can be handed over as unread until all of it has arrived. What was taken is kept
	// for that, but not the last piece, unless it breaks off, so that nothing is copied for a
	// backend that takes all at once.
	arrived bool
	kept    []byte
}

// Into implements backends.Payload.
func (p *payload) Into(b []byte) error {
	if p.err != nil {
		return p.err
	}
	if len(b) > p.left {
		return fmt.Errorf("the backend asks for %d bytes of a write that has %d left", len(b), p.left)
	}
	n, err := p.inbox.readFull(b)
	p.left -= n
	if err != nil || !p.arrived && p.left > 0 {
		p.err = syscall.EFAULT // Should b not be there any more, the connection is lost: what came can't be put back.
		p.kept = append(p.kept, b[:n]...)
	}
	p.err = err
	if errors.Is(err, syscall.EFAULT) {
		p.err = nil // It is the memory of the backend that is not there. What has not come is received elsewhere.
	}
	return err
}

// drain takes what is left, to no purpose but to have it out of the stream.
func (p *payload) drain(pool *buffers) error {
	if p.left == 0 || p.err != nil {
		return p.err
	}
	b := pool.get(min(p.left, largeWrite))
	defer pool.put(b)
	for p.left > 0 && p.err == nil {
		p.Into(b.bytes[:min(p.left, len(b.bytes))])
	}
	return p.err
}
