package server

import (
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A RequestError tells of a request that was answered with an error. The client learns only a
// number, and the user of a Linux device only "input/output error"; everything known is here and in
// the log.
type RequestError struct {
	Op     wire.Command
	Offset uint64 // in bytes, as the client sent it
	Length uint64 // in bytes, as the client sent it
	Err    error
	Errno  uint32        // as sent to the client, a number of the NBD protocol
	Time   time.Time     // of the reply
	Took   time.Duration // until then, since the request was received
}

func (e *RequestError) Error() string {
	return fmt.Sprintf("%s of %d bytes at %d: %v", e.Op, e.Length, e.Offset, e.Err)
}

func (e *RequestError) Unwrap() error { return e.Err }

// A refusal is the fault of the client: the request never reached the backend.
type refusal struct {
	err    syscall.Errno
	reason string
}

func (r *refusal) Error() string { return r.reason }

func (r *refusal) Unwrap() error { return r.err }

// A panicError is a panic of the backend in one request. The server answers that request with an
// I/O error and goes on: for a block device the others' data weigh more than a clean death, and
// what the panic left inconsistent lies in the backend.
type panicError struct {
	value any
	stack []byte
}

func (p *panicError) Error() string {
	// The runtime's own text speaks of nil pointers. What debug.SetPanicOnFault lets panic has an
	// address.
	if f, ok := p.value.(interface{ Addr() uintptr }); ok {
		return fmt.Sprintf("the backend panicked: memory fault at address %#x", f.Addr())
	}
	return fmt.Sprintf("the backend panicked: %v", p.value)
}

// errNoReturn stands for a backend that ended its goroutine (runtime.Goexit, which is what a test's
// FailNow does).
var errNoReturn = errors.New("the backend ended its goroutine instead of returning")

// fail remembers and logs that a request failed, took after it was received, and returns the number
// for the client.
func (c *Conn) fail(h wire.Request, err error, took time.Duration) wire.Errno {
	e := c.export
	code, now := wire.ErrnoOf(err), time.Now()
	if err == errNotFast {
		return code // The client wanted to know.
	}
	if code == wire.ErrnoNotSup && h.Command == wire.CmdWriteZeroes && h.Flags&wire.CmdFlagFastZero == 0 {
		code = wire.ErrnoIO // The other has a meaning of its own ("Request types", NBD_CMD_WRITE_ZEROES).
	}
	failed := &RequestError{
		Op: h.Command, Offset: h.Offset, Length: h.Length, Err: err, Errno: uint32(code), Time: now, Took: took,
	}
	e.lastError.Store(failed)
	if c.loses(h) {
		e.losses.note(failed)
	}
	sort := eventFailed
	if _, ok := err.(*refusal); ok {
		sort = eventRefused
	}
	e.events.Note(sort, func() slog.Record { return requestRecord(sort, h, err, now, took) })
	return code
}

// noteSlow logs a request that succeeded, if it took long.
func (e *Export) noteSlow(h wire.Request, took time.Duration) {
	if took >= e.slowRequest {
		e.events.Note(eventSlow, func() slog.Record { return requestRecord(eventSlow, h, nil, time.Now(), took) })
	}
}
