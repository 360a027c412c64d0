package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/nbdctl/nbdctl/server/wire"
)

// ErrTLSRequired is what an error matches that is due to a server that wants TLS first.
var ErrTLSRequired = errors.New("the server requires TLS: use nbds, or Options.TLS")

// An OptionError is a server's refusal of an option.
type OptionError struct {
	Option wire.Option
	Reply  wire.OptionReply
	Text   string // what the server says to people, at most 4096 bytes; may be empty
}

// readable is what is kept of a server's text for people: UTF-8, and no more than a string can
// have.
func readable(text string) string {
	text = strings.ToValidUTF8(text[:min(len(text), wire.MaxString)], "\uFFFD")
	return strings.ToValidUTF8(text[:min(len(text), wire.MaxString)], "")
}

var refusals = map[wire.OptionReply]string{
	wire.RepErrUnsup:          "not supported",
	wire.RepErrPolicy:         "forbidden",
	wire.RepErrInvalid:        "invalid",
	wire.RepErrPlatform:       "not supported on its platform",
	wire.RepErrTLSRequired:    "TLS is required",
	wire.RepErrUnknown:        "no such export",
	wire.RepErrShutdown:       "it is shutting down",
	wire.RepErrBlockSize:      "it wants to tell block sizes",
	wire.RepErrTooBig:         "too big",
	wire.RepErrExtHeadersReqd: "extended headers are required",
}

// Error implements error.
func (e *OptionError) Error() string {
	why := refusals[e.Reply]
	if why == "" {
		why = fmt.Sprintf("error %d", uint32(e.Reply&^(1<<31)))
	}
	if e.Text != "" {
		return fmt.Sprintf("nbd: the server refuses %v: %s: %q", e.Option, why, e.Text)
	}
	return fmt.Sprintf("nbd: the server refuses %v: %s", e.Option, why)
}

// Is has the error match fs.ErrNotExist where there is no such export, fs.ErrPermission where
// something is forbidden, errors.ErrUnsupported, and ErrTLSRequired.
func (e *OptionError) Is(target error) bool {
	switch e.Reply {
	case wire.RepErrUnknown:
		return target == fs.ErrNotExist
	case wire.RepErrPolicy:
		return target == fs.ErrPermission
	case wire.RepErrUnsup, wire.RepErrPlatform:
		return target == errors.ErrUnsupported
	case wire.RepErrTLSRequired:
		return target == ErrTLSRequired
	}
	return false
}

// A ProtocolError is something that a server must not say. The connection is given up.
type ProtocolError struct{ What string }

// Error implements error.
func (e *ProtocolError) Error() string { return "nbd: the server breaks the protocol: " + e.What }

func protocolError(format string, args ...any) error {
	return &ProtocolError{What: fmt.Sprintf(format, args...)}
}

// A RequestError is a request that the server has refused, or could not execute.
type RequestError struct {
	Command wire.Command
	Offset  int64 // of the request, in bytes
	Length  int64
	Errno   wire.Errno
	// Text is what the server says to people, at most 4096 bytes; may be empty.
	Text string
	// At is where in the export it went wrong, in bytes, if the server told it; else it is Offset.
	At int64
}

// Error implements error.
func (e *RequestError) Error() string {
	s := fmt.Sprintf("nbd: %v of %d bytes at %d", e.Command, e.Length, e.Offset)
	if e.At != e.Offset {
		s += fmt.Sprintf(" failed at %d", e.At)
	}
	s += ": " + e.Unwrap().Error()
	if e.Text != "" {
		s += fmt.Sprintf(" (the server says %q)", e.Text)
	}
	return s
}

// Unwrap returns the error number as one of this system: syscall.ENOSPC, for example.
func (e *RequestError) Unwrap() error {
	switch e.Errno {
	case wire.ErrnoPerm:
		return syscall.EPERM
	case wire.ErrnoNoMem:
		return syscall.ENOMEM
	case wire.ErrnoInvalid:
		return syscall.EINVAL
	case wire.ErrnoNoSpace:
		return syscall.ENOSPC
	case wire.ErrnoOverflow:
		return syscall.EOVERFLOW
	case wire.ErrnoNotSup:
		return syscall.ENOTSUP
	case wire.ErrnoShutdown:
		return syscall.ESHUTDOWN
	}
	return syscall.EIO // as the document has it for numbers that are not known ("Error values")
}
