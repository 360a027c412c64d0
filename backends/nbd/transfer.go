package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"syscall"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// ReadAt implements io.ReaderAt. With an error nothing is known of p.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.read(context.Background(), p, off)
}

// ReadAtContext implements backends.ReaderAtContext. Who gives up does not disturb other requests.
func (c *Client) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return c.read(ctx, p, off)
}

func (c *Client) read(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, c.refuse(wire.CmdRead, off, int64(len(p)))
	}
	if off > c.size || off == c.size && len(p) > 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), c.size-off))
	done, err := c.transfer(ctx, wire.CmdRead, 0, p[:n], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return done, err
}

// WriteAt implements io.WriterAt. It is durable after the next Sync.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.transfer(context.Background(), wire.CmdWrite, 0, p, off)
}

// WriteAtContext implements backends.WriterAtContext. It gives up what was not sent yet, or was
// lost along with its connection. What the server has it waits for.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return c.transfer(ctx, wire.CmdWrite, 0, p, off)
}

// WriteAtFUA implements backends.FUAWriter.
func (c *Client) WriteAtFUA(p []byte, off int64) (int, error) {
	if c.caps&backends.CapFUA == 0 && c.caps&backends.CapWrite != 0 {
		return 0, c.unsupported(wire.CmdWrite, off, int64(len(p)))
	}
	return c.transfer(context.Background(), wire.CmdWrite, wire.CmdFlagFUA, p, off)
}

// transfer reads or writes in pieces that the server takes.
func (c *Client) transfer(ctx context.Context, command wire.Command, flags wire.CommandFlags, p []byte,
	off int64) (int, error) {
	if err := c.check(command, off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		n := int(min(int64(len(p)-done), c.longest))
		r := request{command: command, flags: flags, off: off + int64(done), n: int64(n), data: p[done : done+n]}
		if err := c.do(ctx, &r); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// check refuses what the server would, or might not understand.
func (c *Client) check(command wire.Command, off, n int64) error {
	unit := int64(max(c.agreed.BlockSizes.Minimum, 1))
	switch {
	case off < 0 || n < 0 || off > c.size || n > c.size-off:
		return c.refuse(command, off, n)
	case (off|n)&(unit-1) != 0:
		return fmt.Errorf("nbd: %v of %d bytes at %d: the server takes multiples of %d bytes: %w",
			command, n, off, unit, syscall.EINVAL)
	case command.Writes() && c.caps&backends.CapWrite == 0:
		return fmt.Errorf("nbd: %v of %d bytes at %d: the export is read-only: %w", command, n, off, syscall.EROFS)
	}
	return nil
}

// refuse is the error of a range that is not in the export.
func (c *Client) refuse(command wire.Command, off, n int64) error {
	errno := syscall.EINVAL
	if command == wire.CmdWrite && off >= 0 {
		errno = syscall.ENOSPC
	}
	return fmt.Errorf("nbd: %v of %d bytes at %d: the export has %d: %w", command, n, off, c.size, errno)
}

func (c *Client) unsupported(command wire.Command, off, n int64) error {
	return fmt.Errorf("nbd: %v of %d bytes at %d: the export has nothing of the kind: %w", command, n, off,
		errors.ErrUnsupported)
}

// Sync implements backends.Syncer: it covers writes on all connections ("Transmission flags",
// NBD_FLAG_CAN_MULTI_CONN).
func (c *Client) Sync() error {
	if c.caps&backends.CapSync == 0 {
		return c.unsupported(wire.CmdFlush, 0, 0)
	}
	return c.do(context.Background(), &request{command: wire.CmdFlush})
}

// Trim implements backends.Trimmer.
func (c *Client) Trim(off, n int64) error { return c.effect(wire.CmdTrim, backends.CapTrim, 0, off, n) }

// Cache implements backends.Cacher.
func (c *Client) Cache(off, n int64) error {
	return c.effect(wire.CmdCache, backends.CapCache, 0, off, n)
}

// Zero implements backends.Zeroer.
func (c *Client) Zero(off, n int64, flags backends.ZeroFlags) error {
	var f wire.CommandFlags
	if flags&backends.ZeroNoHole != 0 {
		f |= wire.CmdFlagNoHole
	}
	if flags&backends.ZeroFast != 0 {
		f |= wire.CmdFlagFastZero
		if c.agreed.Flags&wire.FlagSendFastZero == 0 {
			return c.unsupported(wire.CmdWriteZeroes, off, n)
		}
	}
	return c.effect(wire.CmdWriteZeroes, backends.CapZero, f, off, n)
}

// effect makes a request that has an effect on a range, and no data. Its length has 32 bits without
// extended headers. A server may refuse one beyond its longest payload, which is then made in
// pieces of that size ("Block size constraints").
func (c *Client) effect(command wire.Command, needs backends.Caps, flags wire.CommandFlags, off, n int64) error {
	if err := c.check(command, off, n); err != nil {
		return err
	}
	if c.caps&needs == 0 {
		return c.unsupported(command, off, n)
	}
	most := c.mostEffect()
	if flags&wire.CmdFlagFastZero != 0 && n > most {
		return c.unsupported(command, off, n) // With a part of it done there would be no way back.
	}
	for n > 0 {
		piece := min(n, most)
		err := c.do(context.Background(), &request{command: command, flags: flags, off: off, n: piece})
		if tooLong(err) && piece > c.longest && flags&wire.CmdFlagFastZero == 0 {
			most = c.longest
			continue
		}
		if err != nil {
			return err
		}
		off += piece
		n -= piece
	}
	return nil
}

// mostEffect is the longest range of a request without data, in bytes.
func (c *Client) mostEffect() int64 {
	if c.agreed.Extended {
		return math.MaxInt64
	}
	unit := int64(max(c.agreed.BlockSizes.Minimum, unstatedBlock))
	return math.MaxUint32 / unit * unit
}

// tooLong reports whether the server may have refused a request for its length.
func tooLong(err error) bool {
	if err == nil {
		return false // What follows is on the heap.
	}
	var refused *RequestError
	return errors.As(err, &refused) && (refused.Errno == wire.ErrnoOverflow || refused.Errno == wire.ErrnoInvalid)
}
