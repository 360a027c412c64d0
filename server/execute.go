package server

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/wire"
)

// zeroPiece is the length of the writes that stand for a WRITE_ZEROES, in bytes.
const zeroPiece = 256 << 10

// execute has the backend carry out a request that passed check. p is the payload of a WRITE, or
// the room for that of a READ. When it returns nil, what the client asked for is done and, with
// FUA, durable.
func (e *Export) execute(ctx context.Context, h wire.Request, p []byte) error {
	off, n := int64(h.Offset), int64(h.Length)
	if n == 0 && h.Command != wire.CmdFlush {
		return nil // The protocol leaves a request for nothing undefined; backends need not know that it exists.
	}
	fua := h.Flags&wire.CmdFlagFUA != 0
	switch h.Command {
	case wire.CmdRead:
		m, err := e.readAt(ctx, p, off)
		return whole(m, len(p), err, io.ErrUnexpectedEOF)
	case wire.CmdWrite:
		return e.write(ctx, p, off, fua)
	case wire.CmdTrim:
		if err := e.dev.Trimmer.Trim(off, n); err != nil {
			return err
		}
		return e.syncIf(fua)
	case wire.CmdCache:
		if e.dev.Cacher == nil {
			return nil // since Swap
		}
		return e.dev.Cacher.Cache(off, n)
	case wire.CmdWriteZeroes:
		if err := e.zero(ctx, off, n, h.Flags); err != nil {
			return err
		}
		return e.syncIf(fua)
	default:
		return e.syncIf(true)
	}
}

// rangeOf is the range of bytes that a request changes.
func rangeOf(h *wire.Request) rangelock.Range { return rangelock.Range{First: h.Offset, End: h.End()} }

// readAt and writeAt let the backend know when nobody waits any more, if it wants to.
func (e *Export) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	if e.dev.ReadContext != nil {
		return e.dev.ReadContext.ReadAtContext(ctx, p, off)
	}
	return e.dev.ReadAt(p, off)
}

func (e *Export) writeAt(ctx context.Context, p []byte, off int64) (int, error) {
	if e.dev.WriteContext != nil {
		return e.dev.WriteContext.WriteAtContext(ctx, p, off)
	}
	return e.dev.WriterAt.WriteAt(p, off)
}

func (e *Export) write(ctx context.Context, p []byte, off int64, fua bool) error {
	if fua && e.dev.FUAWriter != nil {
		n, err := e.dev.FUAWriter.WriteAtFUA(p, off)
		return whole(n, len(p), err, io.ErrShortWrite)
	}
	n, err := e.writeAt(ctx, p, off)
	if err := whole(n, len(p), err, io.ErrShortWrite); err != nil {
		return err
	}
	return e.syncIf(fua)
}

// whole judges the result of a ReadAt or WriteAt. All bytes is success whatever err says, for a
// reader may well return io.EOF along with the last of them. Fewer is a failure even without an
// error: zeros in their place would be silent corruption.
func whole(n, want int, err, short error) error {
	if n == want {
		return nil
	}
	if err == nil {
		err = short
	}
	return &partialError{n: n, want: want, err: err}
}

// A partialError is a call of the backend that has done a part of what it was asked for.
type partialError struct {
	n, want int // bytes
	err     error
}

func (e *partialError) Error() string { return fmt.Sprintf("%d of %d bytes: %v", e.n, e.want, e.err) }

func (e *partialError) Unwrap() error { return e.err }

// syncIf makes all that was written durable. A backend without Sync has it durable already.
func (e *Export) syncIf(wanted bool) error {
	if !wanted || e.dev.Syncer == nil {
		return nil
	}
	return e.dev.Syncer.Sync()
}

// zero makes the range read as zeros. Where the backend has no way of its own, or says that it has
// none for this range after all, zeros are written, which also leaves no hole, unless only quick
// ones are wanted.
func (e *Export) zero(ctx context.Context, off, n int64, flags wire.CommandFlags) error {
	if e.dev.Zeroer != nil {
		var how backends.ZeroFlags
		if flags&wire.CmdFlagNoHole != 0 {
			how |= backends.ZeroNoHole
		}
		if flags&wire.CmdFlagFastZero != 0 {
			how |= backends.ZeroFast
		}
		if err := e.dev.Zeroer.Zero(off, n, how); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if flags&wire.CmdFlagFastZero != 0 {
		return errNotFast
	}
	b := payloads.get(int(min(n, zeroPiece, int64(e.maxLength))))
	defer payloads.put(b)
	clear(b.bytes)
	for n > 0 {
		p := b.bytes[:min(n, int64(len(b.bytes)))]
		if err := e.write(ctx, p, off, false); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}
