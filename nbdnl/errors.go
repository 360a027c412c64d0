package nbdnl

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

var (
	// ErrNoDriver means that the kernel offers no NBD control interface here: the nbd module is
	// absent or not loaded, or, up to Linux 6.1 and for a Client that is to use netlink only, the
	// process is in another network namespace than init.
	ErrNoDriver = errors.New("no nbd driver in this kernel")

	// ErrNotOwner means that the device carries another identifier than the caller's.
	ErrNotOwner = errors.New("device belongs to another")

	// ErrNotConnected means that the device exists but has no configuration.
	ErrNotConnected = errors.New("device is not connected")

	// ErrBusy means that the device is in use, or merely open, or that somebody else has leased it.
	ErrBusy = claim.ErrBusy

	// ErrNotWritten means that data which the kernel had cached of a device could not be written,
	// and is lost.
	ErrNotWritten = errors.New("cached data could not be written")

	// ErrNoDeadConnection means that a connection was to be replaced, and none was dead.
	ErrNoDeadConnection = errors.New("no connection is dead")

	// ErrShutDown means that the kernel has taken a socket, and shut it down again.
	ErrShutDown = errors.New("the kernel has shut the socket down again")

	// ErrStranded means that the kernel has not begun to receive from some of a device's
	// connections, and will not.
	ErrStranded = errors.New("the kernel receives from a part of the connections only")

	// ErrNotVerified means that the kernel has obeyed a command in a way that can't be found out.
	ErrNotVerified = errors.New("whether the kernel has taken the sockets can't be told")

	// errAnswerLost means that the kernel executed a command, but its reply did not arrive.
	errAnswerLost = errors.New("the kernel's answer got lost")
)

// An Error is a failed operation on a device.
//
// It matches, with errors.Is, what its cause matches, and besides: ErrBusy and os.ErrExist for
// EBUSY, os.ErrNotExist for ENODEV, and errors.ErrUnsupported for EOPNOTSUPP.
type Error struct {
	// Op is the operation, such as "connect".
	Op string
	// Index is the device's, or -1 when the kernel was to choose or none is concerned.
	Index int
	// Err is the cause; a syscall.Errno is found with errors.As.
	Err error
}

// Error names the operation, the device and the cause.
func (e *Error) Error() string {
	if e.Index < 0 {
		return fmt.Sprintf("nbdnl: %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("nbdnl: %s %s: %v", e.Op, name(e.Index), e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether the kernel's answer means target.
func (e *Error) Is(target error) bool {
	var errno syscall.Errno
	if !errors.As(e.Err, &errno) {
		return false
	}
	switch target {
	case ErrBusy, os.ErrExist:
		return errno == syscall.EBUSY
	case os.ErrNotExist:
		return errno == syscall.ENODEV
	case errors.ErrUnsupported:
		return errno == syscall.EOPNOTSUPP
	}
	return false
}

// newError wraps err, if there is one, with the operation and the device.
func newError(op string, index int, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Index: index, Err: err}
}

// An UnsupportedError is a setting that this kernel accepts, but does not put in force, or one that
// ioctls can't make. It matches errors.ErrUnsupported.
//
// If Reason does not say, the reason may also be a setting of the index that outlives its users:
// from Linux 6.10 on, a cache that somebody has switched off in queue/write_cache takes flush and
// FUA from all who come, until it is switched on again.
type UnsupportedError struct {
	Index int
	// Setting is its name: "size", "block size", "read-only", "flush", "fua" or "trim"; with a
	// Reason also "dead connection timeout", "client flags" or "replacing connections".
	Setting string
	// Want is what was asked for, Got what sysfs shows: bytes for the sizes, "true" or "false".
	Want, Got string
	// Reason is why it was not even tried.
	Reason string
}

// Error names the device, the setting and its values.
func (e *UnsupportedError) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("%s (%s) is not possible: %s", e.Setting, e.Want, e.Reason)
	}
	return fmt.Sprintf("this kernel gives %s %s %s instead of %s", name(e.Index), e.Setting, e.Got, e.Want)
}

// Is reports whether target is errors.ErrUnsupported.
func (e *UnsupportedError) Is(target error) bool { return target == errors.ErrUnsupported }

// A DroppedError says which sockets a device did not take in the place of dead connections, because
// there were not as many. It matches ErrNoDeadConnection.
type DroppedError struct {
	Index int
	// Sockets are positions in the list that was given, ascending.
	Sockets []int
}

// Error names the device and the sockets.
func (e *DroppedError) Error() string {
	return fmt.Sprintf("%s has not taken sockets %v: %v (shut down the old one first, and wait for its end)",
		name(e.Index), e.Sockets, ErrNoDeadConnection)
}

// Is reports whether target is ErrNoDeadConnection.
func (e *DroppedError) Is(target error) bool { return target == ErrNoDeadConnection }

// A ShutDownError says which sockets a device took in the place of dead connections and then shut
// down, because it had not quite finished with those. Others can be given at once. It matches
// ErrShutDown.
type ShutDownError struct {
	Index int
	// Sockets are positions in the list that was given, ascending.
	Sockets []int
}

// Error names the device and the sockets.
func (e *ShutDownError) Error() string {
	return fmt.Sprintf("%s has taken sockets %v and lost them with the connections before: %v (give others)",
		name(e.Index), e.Sockets, ErrShutDown)
}

// Is reports whether target is ErrShutDown.
func (e *ShutDownError) Is(target error) bool { return target == ErrShutDown }

// A BusyError says who keeps a device from being detached. It matches ErrBusy.
type BusyError struct {
	Index int
	// Holders are those that were found. What only the kernel knows, such as a mount in a namespace
	// without processes, shows as one holder of kind holder.Exclusive.
	Holders []holder.Holder
	// Disconnected is true when the device has been disconnected all the same: every access to it
	// fails, and its index becomes free when the holders let go of it.
	Disconnected bool
}

// Error names the device and its holders.
func (e *BusyError) Error() string {
	var b strings.Builder
	if e.Disconnected {
		fmt.Fprintf(&b, "%s is disconnected, but its index becomes free only when it is released", name(e.Index))
	} else {
		fmt.Fprintf(&b, "%s is in use", name(e.Index))
	}
	for i, h := range e.Holders {
		if i == maxNamedHolders {
			fmt.Fprintf(&b, " and %d more", len(e.Holders)-i)
			break
		}
		if i == 0 {
			b.WriteString(" by ")
		} else {
			b.WriteString(", ")
		}
		b.WriteString(h.String())
	}
	return b.String()
}

// maxNamedHolders bounds the length of a message; BusyError.Holders has them all.
const maxNamedHolders = 4

// Is reports whether target is ErrBusy.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }
