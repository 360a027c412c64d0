// Package exit gives nbdctl's errors their exit codes.
package exit

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// A Code is an exit status of nbdctl. The numbers are documented and stable.
type Code int

// The exit codes.
const (
	OK          Code = 0
	Failure     Code = 1 // anything else, also a backing object that can't be opened
	Usage       Code = 2 // never valid, whatever the machine
	NotFound    Code = 3 // no such device or export, or not connected
	Permission  Code = 4 // not permitted, also a device that is not ours
	Unsupported Code = 5 // not on this machine: no driver, a kernel too old
	Busy        Code = 6 // device taken or in use, image locked, name taken
)

// An Error carries its code along, for errors whose kind no library type tells.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// With formats an error that has a code of its own.
func With(c Code, format string, args ...any) error {
	return &Error{c, fmt.Errorf(format, args...)}
}

// Usagef formats an error about what was typed.
func Usagef(format string, args ...any) error { return With(Usage, format, args...) }

// Of finds the code of err. Of several joined errors the first that has one counts.
func Of(err error) Code {
	var own *Error
	switch {
	case err == nil:
		return OK
	case errors.As(err, &own):
		return own.Code
	case errors.Is(err, nbdnl.ErrNotOwner):
		return Permission
	case errors.Is(err, nbdnl.ErrBusy), errors.Is(err, file.ErrLocked):
		return Busy
	case errors.Is(err, nbdnl.ErrNotConnected):
		return NotFound
	case errors.Is(err, nbdnl.ErrNoDriver), errors.Is(err, errors.ErrUnsupported):
		return Unsupported
	case errors.Is(err, fs.ErrPermission):
		return Permission
	}
	return Failure
}
