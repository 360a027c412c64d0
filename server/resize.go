package server

import (
	"context"
	"fmt"
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
	if err := e.change(ctx); err != nil {
		return err
	}
	defer e.unchange()
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

// drain returns when every request that was let in before the call has been answered. Unless h is
// nil, no other one is let in before its end, on any connection, also of those that begin
// meanwhile.
func (e *Export) drain(ctx context.Context, h *Hold) error {
	var release chan struct{}
	if h != nil {
		release = h.release
	}
	e.mu.Lock()
	e.held = h
	told := make(map[*Conn]*quiescence, len(e.live))
	for c := range e.live {
		if q := c.control.quiesce(release); q != nil {
			told[c] = q
		}
	}
	e.mu.Unlock()
	var err error
	for c, q := range told {
		select {
		case <-q.reached:
		case <-c.ended:
		case <-ctx.Done():
			err = context.Cause(ctx)
			q.dropped.Store(true)
			c.limit.Wake()
		}
	}
	return err
}
