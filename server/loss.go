package server

import (
	"fmt"
	"sync"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A LossError tells of writes, zeroes and flushes that were answered with an error: bytes that are
// not where whoever wrote them may believe them to be. The Linux client tells that to the writer
// only if it still waits; what was cached, and acknowledged long before, is lost in silence, or to
// whoever asks first.
type LossError struct {
	// Requests is how many have failed, at least 1. Of what Export.Loss returns it is the number,
	// too: the same is the same loss, asked for again, and a new one has a higher one.
	Requests uint64
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
	notify func(*RequestError) // called after each; nil: nobody is
}

func (l *losses) note(e *RequestError) {
	l.mu.Lock()
	if l.all.Requests == 0 {
		l.all.First = e
	}
	l.all.Requests++
	notify := l.notify
	l.mu.Unlock()
	if notify != nil {
		notify(e)
	}
}

// Loss returns which requests have failed since the export was made, or nil. It returns the same
// however often it is called, until another one fails. It counts those that promise bytes, which
// reads and trims do not, and the syncs of Swap and Sync. Nor does it count what was sent over a
// connection that the client has given up: that client sends it again over another one, or knows
// that it has lost it.
func (e *Export) Loss() *LossError {
	e.losses.mu.Lock()
	defer e.losses.mu.Unlock()
	if e.losses.all.Requests == 0 {
		return nil
	}
	loss := e.losses.all
	return &loss
}

// OnLoss has f called with each request that Loss counts, before the client has the answer. f must
// not block, nor change the request, and may be called from several goroutines at once. OnLoss is
// to be called before the export is served.
func (e *Export) OnLoss(f func(*RequestError)) {
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
