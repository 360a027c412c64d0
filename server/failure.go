package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"
)

// A RequestError tells of a request that was answered with an error. The client learns only a number, and the user of a Linux
// device only "input/output error"; everything known is here and in the log.
type RequestError struct {
	Op     Op
	Offset uint64 // in bytes, as the client sent it
	Length uint32 // in bytes, as the client sent it
	Err    error
	Time   time.Time // of the reply
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

// A panicError is a panic of the backend in one request. The server answers that request with an I/O error and goes on: for a
// block device the others' data weigh more than a clean death, and what the panic left inconsistent lies in the backend.
type panicError struct {
	value any
	stack []byte
}

func (p *panicError) Error() string { return fmt.Sprintf("the backend panicked: %v", p.value) }

// errNoReturn stands for a backend that ended its goroutine (runtime.Goexit, which is what a test's FailNow does).
var errNoReturn = errors.New("the backend ended its goroutine instead of returning")

// fail remembers and logs that a request failed, and returns the number for the client.
func (e *Export) fail(h header, err error) errno {
	e.lastError.Store(&RequestError{Op: h.op, Offset: h.offset, Length: h.length, Err: err, Time: time.Now()})

	code, level := wireErrno(err), slog.LevelError
	if _, ok := err.(*refusal); ok {
		level = slog.LevelWarn
	}
	attrs := []any{
		slog.String("op", h.op.String()), slog.Uint64("offset", h.offset), slog.Uint64("length", uint64(h.length)),
		slog.Uint64("errno", uint64(code)), slog.Any("err", err),
	}
	if p, ok := err.(*panicError); ok {
		attrs = append(attrs, slog.String("stack", string(p.stack)))
	}
	e.log.Log(context.Background(), level, "request failed", attrs...)
	return code
}
