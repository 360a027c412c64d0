package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
)

// Resize sets the size in bytes against which requests are checked from now on: a multiple of the
// block size, and not more than the backend has. It does not tell the clients, nor resize the
// backend, which is to have grown before, and to shrink after.
//
// When the size shrinks, Resize returns once no request that was let in before is beyond the new
// end, on any connection, and the replies to all of them are sent: the backend may cut off the rest
// then. For that each connection stops reading for a moment; the read deadline is used for it, and
// cleared afterwards. If ctx ends first, its error is returned and the size is as before. Growing
// never waits.
func (e *Export) Resize(ctx context.Context, size int64) error {
	e.resizing.Lock()
	defer e.resizing.Unlock()
	switch have := e.dev.Size(); {
	case size < 0 || size%int64(e.blockSize) != 0:
		return fmt.Errorf("server: size %d is not a multiple of the block size, %d bytes", size, e.blockSize)
	case size > have:
		return fmt.Errorf("server: size %d is more than the %d bytes that the backend has", size, have)
	}
	old := e.size.Swap(size)
	if size >= old {
		return nil
	}
	if err := e.drain(ctx, nil); err != nil {
		e.size.Store(old)
		return fmt.Errorf("server: requests beyond byte %d have not come to an end: %w", size, err)
	}
	return nil
}

// drain returns when every request that was let in before the call has been answered. Unless
// release is nil, no other one is let in until it is closed, on any connection, also of those that
// begin meanwhile; held is to be cleared before.
func (e *Export) drain(ctx context.Context, release chan struct{}) error {
	e.mu.Lock()
	e.held = release
	fences := make(map[*Conn]*fence, len(e.live))
	for c := range e.live {
		fences[c] = c.block(release)
	}
	e.mu.Unlock()
	var err error
	for c, f := range fences {
		if f == nil {
			continue
		}
		select {
		case <-f.passed:
		case <-c.ended:
		case <-ctx.Done():
			err = context.Cause(ctx)
			c.unblock(f)
		}
	}
	return err
}

// A fence lies between two requests of a connection: the loop passes it when all before it are
// answered. It costs the loop nothing to have none, for it is told in the way in which Shutdown
// tells it to stop: by the read deadline.
type fence struct {
	passed  chan struct{} // closed
	dropped atomic.Bool   // nobody waits for it any more
	release chan struct{} // that keep the loop until it is closed, or nil
}

// block puts a fence in front of the loop, in place of one that was dropped. It returns nil if
// nothing is in flight.
func (c *Conn) block(release chan struct{}) *fence {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase != phaseServing {
		return nil
	}
	c.fence = &fence{passed: make(chan struct{}), release: release}
	_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // Fails on a closed connection, whose loop ends by itself.
	return c.fence
}

// disturb has the loop go back, should it be waiting in the middle of a request, to before that:
// what the request holds meanwhile is given up, and what came of it is there again when the loop
// goes on.
func (c *Conn) disturb() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == phaseServing && c.fence == nil { // A fence that is there does the same.
		c.fence = &fence{passed: make(chan struct{})}
		c.fence.dropped.Store(true)
		_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // As above.
	}
}

// unblock lets the loop go on, wherever it is.
func (c *Conn) unblock(f *fence) {
	f.dropped.Store(true)
	c.limit.Wake()
}

// pass reports whether the loop, which has ended with err, was merely stopped by a fence and is to
// go on. Not a byte was lost: what had arrived of a request comes first again, and is checked anew.
func (c *Conn) pass(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.mu.Lock()
	f := c.fence
	c.mu.Unlock()
	if f == nil || c.flush() != nil {
		return false
	}
	drained := c.limit.Drained(&f.dropped)
	if drained && f.release != nil {
		close(f.passed)
		<-f.release
		drained = false // That has been told.
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping.Load() {
		return false
	}
	if c.fence == f { // Else there is another one behind it.
		c.fence = nil
		_ = c.nc.SetReadDeadline(time.Time{}) // As above.
	}
	if drained {
		close(f.passed)
	}
	return true
}
