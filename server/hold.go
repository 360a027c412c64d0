package server

import (
	"context"
	"fmt"
)

// A Hold keeps the connections of an export from reading. It ends with Release or Leave, of which
// the first that is called counts.
type Hold struct {
	export  *Export
	release chan struct{} // closed with the end

	// These are guarded by the mu of export.
	asked       []*Conn // by Unread
	ended, left bool
}

// Hold returns when every request that was read is answered, on all connections. They read nothing
// until the Hold ends, and neither do those that begin meanwhile: what clients send waits in the
// sockets. durable has the backend synced then. If ctx ends before, or the sync fails, requests go
// on, and the error says why. The read deadlines of the connections are used for it.
//
// Calls that change the export wait for the end of the Hold, and so does Sync. Nothing is in the
// backend meanwhile, also no sync that was given up earlier.
func (e *Export) Hold(ctx context.Context, durable bool) (*Hold, error) {
	if err := e.change(ctx); err != nil {
		return nil, err
	}
	h, err := e.hold(ctx)
	if err == nil {
		err = e.synced(ctx)
	}
	if err == nil && durable {
		err = e.sync(ctx)
	}
	if err != nil {
		h.Release()
		return nil, err
	}
	return h, nil
}

// hold is Hold without a sync, for who has the export to change. It returns a Hold to be ended also
// with an error.
func (e *Export) hold(ctx context.Context) (*Hold, error) {
	h := &Hold{export: e, release: make(chan struct{})}
	if err := e.drain(ctx, h); err != nil {
		return h, fmt.Errorf("server: requests have not come to an end: %w", err)
	}
	return h, nil
}

// Release lets requests go on as if nothing had been.
func (h *Hold) Release() {
	if h.end(false) {
		h.export.unchange()
	}
}

// Leave ends all connections with nothing more read or written: their Transmit returns ErrShutdown.
// The sockets stay open, so that somebody else can go on with them, and with what Unread has
// returned of each.
func (h *Hold) Leave() {
	if h.end(true) {
		h.export.unchange()
	}
}

// end ends the hold, unless it has ended, and reports whether it did.
func (h *Hold) end(leave bool) bool {
	e := h.export
	e.mu.Lock()
	if h.ended {
		e.mu.Unlock()
		return false
	}
	h.ended, h.left, e.held = true, leave, nil
	var precluded []*Conn
	if leave {
		for c := range e.live {
			_ = c.control.stop() // Who can't be told has ended.
		}
		for _, c := range h.asked {
			if c.control.preclude() {
				precluded = append(precluded, c)
			} else {
				_ = c.control.stop()
			}
		}
	}
	close(h.release)
	e.mu.Unlock()
	for _, c := range precluded {
		c.retire()
	}
	return true
}

// Unread returns what a connection has received and not executed: complete requests, the beginning
// of one, or both. Not ok: it has ended, or its client has hung up, or the Hold has ended, and
// nobody can go on with it. It is valid until the Hold ends.
func (h *Hold) Unread(c *Conn) (unread []byte, ok bool) {
	h.export.mu.Lock() // No connection begins meanwhile, and the Hold does not end.
	defer h.export.mu.Unlock()
	if h.ended || c.abandoned() || c.broken.Load() {
		return nil, false
	}
	select {
	case <-c.stopped:
		return nil, false
	case <-c.ended:
		return nil, false
	default:
	}
	h.asked = append(h.asked, c)
	if c.control.serving() {
		return c.loop.inbox.unread(), true // Its loop stands still, or has not begun.
	}
	return c.unread, true
}
