package server

import (
	"fmt"
	"sync"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A LossError tells of writes, zeroes and flushes that were answered with an error: bytes that are not where whoever wrote them
// may believe them to be. The Linux client tells that to the writer only if it still waits; what was cached, and acknowledged long
// before, is lost in silence, or to whoever asks first.
type LossError struct {
	Requests uint64        // that failed, at least 1
	First    *RequestError // of them
}

func (e *LossError) Error() string {
	if e.Requests == 1 {
		return fmt.Sprintf("a request did not reach the backend: %v", e.First)
	}
	return fmt.Sprintf("%d requests did not reach the backend, of which the first: %v", e.Requests, e.First)
}

func (e *LossError) Unwrap() error { return e.First }

// losses are the requests that failed. The zero value is none. Safe for concurrent use.
type losses struct {
	mu     sync.Mutex // guards all below
	all    LossError
	untold LossError // of all, those that TakeLoss has not told of
	notify func()    // called after the first; nil: nobody is
}

func (l *losses) note(e *RequestError) {
	l.mu.Lock()
	l.all.add(e)
	l.untold.add(e)
	notify := l.notify
	l.notify = nil
	l.mu.Unlock()
	if notify != nil {
		notify()
	}
}

// add counts another request.
func (e *LossError) add(r *RequestError) {
	if e.Requests == 0 {
		e.First = r
	}
	e.Requests++
}

// orNil returns a copy, or nil if nothing was lost.
func (e LossError) orNil() *LossError {
	if e.Requests == 0 {
		return nil
	}
	return &e
}

// Loss returns which requests have failed since the export was made, or nil, however often that was told. It counts those that
// promise bytes, which reads and trims do not, and the syncs of Swap and Sync. Nor does it count what was sent over a connection that the client has given up: that
// client sends it again over another one, or knows that it has lost it.
func (e *Export) Loss() *LossError {
	e.losses.mu.Lock()
	defer e.losses.mu.Unlock()
	return e.losses.all.orNil()
}

// TakeLoss is Loss for what has failed since TakeLoss was called last: each failure is told once.
func (e *Export) TakeLoss() *LossError {
	l := &e.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	untold := l.untold.orNil()
	l.untold = LossError{}
	return untold
}

// OnLoss has f called once, when Loss ceases to be nil. f must not block. It is to be called before the export is served.
func (e *Export) OnLoss(f func()) {
	e.losses.mu.Lock()
	defer e.losses.mu.Unlock()
	e.losses.notify = f
}

// loses reports whether something is lost when the request fails on this connection.
func (c *Conn) loses(h wire.Request) bool {
	switch h.Command {
	case wire.CmdWrite, wire.CmdWriteZeroes, wire.CmdFlush:
		return !c.abandoned() && !c.hungUp()
	default:
		return false
	}
}
