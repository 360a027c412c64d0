package server

import (
	"fmt"
	"sync"
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

// losses are those that nobody was told of. The zero value is none. Safe for concurrent use.
type losses struct {
	mu    sync.Mutex // guards all below
	count uint64
	first *RequestError
}

func (l *losses) note(e *RequestError) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count == 0 {
		l.first = e
	}
	l.count++
}

// TakeLoss returns which requests have failed since it was called last, or nil: each failure is told once. It counts those that
// promise bytes, which reads and trims do not. Nor does it count what was sent over a connection that the client has given up: that
// client sends it again over another one, or knows that it has lost it.
func (e *Export) TakeLoss() *LossError {
	l := &e.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count == 0 {
		return nil
	}
	err := &LossError{Requests: l.count, First: l.first}
	l.count, l.first = 0, nil
	return err
}

// loses reports whether something is lost when the request fails on this connection.
func (c *Conn) loses(h header) bool {
	switch h.op {
	case OpWrite, OpWriteZeroes, OpFlush:
		return !c.abandoned() && !c.hungUp()
	default:
		return false
	}
}
