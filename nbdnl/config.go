package nbdnl

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// A Config says what a new device is to be. The zero value of a field is the kernel's default,
// unless the field says otherwise.
type Config struct {
	// Sockets carry the transmission phase, the kernel being the client; any handshake is done.
	// They must be TCP or Unix stream sockets (*net.TCPConn, *net.UnixConn). Connect neither closes
	// nor keeps them: the kernel takes a reference of its own, and the caller may close them when
	// Connect returns. A Connect that fails may have shut them down, so take new ones for the next
	// attempt. More than one needs FlagCanMultiConn.
	Sockets []syscall.Conn

	// Size of the device in bytes: positive, and a multiple of the block size.
	Size int64

	// BlockSize in bytes is the device's logical and physical sector: a power of two from 512 to
	// 65536, of which many kernels take no more than the page size. 0 is 1024.
	BlockSize int

	// Flags are what the server can do. FlagHasFlags is added. A device on which FlagReadOnly,
	// FlagSendFlush, FlagSendFUA (beside FlagSendFlush) or FlagSendTrim is not in force is not
	// connected. The others are offers, of which Status.Flags shows what the kernel has made.
	Flags Flags

	// ClientFlags are sent only when not zero. There are none by ioctls.
	ClientFlags ClientFlags

	// Timeout bounds each request; a connection that exceeds it is shut down. Whole seconds. With 0
	// and one connection a request waits for ever. It is always sent, since a device whose timeout
	// is left out inherits that of its index's former user.
	Timeout time.Duration

	// DeadConnTimeout is how long requests wait for a new socket once all connections are dead.
	// Whole seconds; always sent. There is none by ioctls.
	DeadConnTimeout time.Duration

	// Identifier marks the device as the caller's (see NewIdentifier). Printable, at most 1024
	// bytes, shown in /sys/block/nbdN/backend from Linux 5.14. Empty: none. By ioctls only the
	// Client knows it.
	Identifier string
}

// validate returns what is wrong with the configuration on any machine; what only this kernel
// lacks, it is asked for.
func (c *Config) validate() error {
	if len(c.Sockets) == 0 {
		return errors.New("no socket given")
	}
	if len(c.Sockets) > 1 && c.Flags&FlagCanMultiConn == 0 {
		return fmt.Errorf(
			"%d sockets need FlagCanMultiConn, the promise that a flush on one covers the writes on all",
			len(c.Sockets),
		)
	}
	block := c.blockSize()
	return errors.Join(
		checkSockets(c.Sockets),
		checkBlockSize(block),
		checkSize(c.Size, block),
		checkTimeout("timeout", c.Timeout),
		checkTimeout("dead connection timeout", c.DeadConnTimeout),
		names.CheckIdentifier(c.Identifier),
	)
}

// blockSize returns the block size in bytes that the kernel is asked for.
func (c *Config) blockSize() int {
	if c.BlockSize == 0 {
		return defaultBlockSize
	}
	return c.BlockSize
}

func checkSockets(socks []syscall.Conn) error {
	if len(socks) > maxSockets {
		return fmt.Errorf("%d sockets, at most %d are possible", len(socks), maxSockets)
	}
	for i, s := range socks {
		if s == nil {
			return fmt.Errorf("socket %d is nil", i)
		}
	}
	return nil
}

func checkBlockSize(n int) error {
	if n < minBlockSize || n > maxBlockSize || n&(n-1) != 0 {
		return fmt.Errorf("block size %d is not a power of two from %d to %d", n, minBlockSize, maxBlockSize)
	}
	return nil
}

func checkSize(size int64, block int) error {
	if size <= 0 {
		return fmt.Errorf("size %d is not positive", size)
	}
	if block > 0 && size%int64(block) != 0 {
		// The kernel accepts it, and leaves a tail that fails reads in odd ways.
		return fmt.Errorf("size %d is not a multiple of the block size %d", size, block)
	}
	return nil
}

func checkTimeout(name string, d time.Duration) error {
	switch {
	case d < 0 || d > maxTimeout:
		return fmt.Errorf("%s %v is not within 0s and %v", name, d, maxTimeout)
	case d%time.Second != 0:
		return fmt.Errorf("%s %v is not in whole seconds, the kernel's unit", name, d)
	}
	return nil
}
