package nbdnl

import (
	"errors"
	"syscall"
	"time"
)

// An Update says what Reconfigure changes: a nil field, or an empty list of sockets, leaves that
// setting alone. Units and ranges are those of Config.
type Update struct {
	// Sockets replace connections that are dead, in order. Their number can't grow.
	Sockets []syscall.Conn
	Size    *int64
	// BlockSize without Size keeps the size in bytes, which must be a multiple of it.
	BlockSize *int
	// Timeout is sent along with sockets also when it is nil and the Client knows it, and then
	// resets queue/io_timeout if somebody has changed that.
	Timeout         *time.Duration
	DeadConnTimeout *time.Duration
	// ClientFlags replace both flags.
	ClientFlags *ClientFlags
}

func (u *Update) validate() error {
	errs := []error{checkSockets(u.Sockets)}
	block := 1
	if u.BlockSize != nil {
		block = *u.BlockSize
		errs = append(errs, checkBlockSize(block))
	}
	if u.Size != nil {
		errs = append(errs, checkSize(*u.Size, block))
	}
	if u.Timeout != nil {
		errs = append(errs, checkTimeout("timeout", *u.Timeout))
	}
	if u.DeadConnTimeout != nil {
		errs = append(errs, checkTimeout("dead connection timeout", *u.DeadConnTimeout))
	}
	if u.Size != nil && len(u.Sockets) > 0 {
		// nbd_genl_reconfigure sets the size first, which waits for requests that hang on the very
		// connections the sockets are to replace.
		errs = append(errs,
			errors.New("size and sockets in one update can deadlock the kernel: send the sockets first"))
	}
	return errors.Join(errs...)
}
