package blocksize

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nbdctl/nbdctl/backends"
)

// ReadAt implements io.ReaderAt.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	return b.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext implements backends.ReaderAtContext.
func (b *Backend) ReadAtContext(ctx context.Context, p []byte, off int64) (done int, _ error) {
	var eof error
	if rest := max(b.Size()-off, 0); int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	for done < len(p) {
		n, err := b.readSome(ctx, p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, eof
}

// WriteAt implements io.WriterAt.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	return b.write(context.Background(), p, off, false)
}

// WriteAtContext implements backends.WriterAtContext.
func (b *Backend) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return b.write(ctx, p, off, false)
}

// WriteAtFUA implements backends.FUAWriter.
func (b *Backend) WriteAtFUA(p []byte, off int64) (int, error) {
	return b.write(context.Background(), p, off, true)
}

func (b *Backend) write(ctx context.Context, p []byte, off int64, fua bool) (done int, _ error) {
	c, err := b.claim(ctx, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer b.changes.drop(c)
	for done < len(p) {
		at := off + int64(done)
		n := b.asIs(at, len(p)-done)
		if n > 0 {
			err = b.writeInner(ctx, p[done:][:n], at, fua)
		} else {
			n, err = b.writePart(ctx, p[done:], int64(len(p)-done), at, fua)
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Zero implements backends.Zeroer. Blocks that are covered in part are written, which is never
// fast.
func (b *Backend) Zero(off, n int64, flags backends.ZeroFlags) error {
	lo, hi, end := b.up(off), b.down(off+n), off+n
	if flags&backends.ZeroFast != 0 && (lo != off || hi != end) {
		return fmt.Errorf("blocksize: zeros in parts of blocks of %d bytes: %w", b.unit, errors.ErrUnsupported)
	}
	ctx := context.Background()
	c, err := b.claim(ctx, off, n)
	if err != nil {
		return err
	}
	defer b.changes.drop(c)
	if lo < hi { // The first, for if it is unsupported nothing may have changed.
		if err := b.inner.Zeroer.Zero(lo, hi-lo, flags); err != nil {
			return err
		}
	}
	head := min(lo, end)
	if err := b.zeroPart(ctx, off, head); err != nil {
		return err
	}
	return b.zeroPart(ctx, max(hi, head), end)
}

// zeroPart writes zeros over a part of one block, if it is any.
func (b *Backend) zeroPart(ctx context.Context, from, to int64) error {
	if from == to {
		return nil
	}
	_, err := b.writePart(ctx, nil, to-from, from, false)
	return err
}

// claim waits until the blocks of a range can be changed.
func (b *Backend) claim(ctx context.Context, off, n int64) (*claim, error) {
	return b.changes.take(ctx, b.down(off), b.up(off+n), b.down(off|n) == off|n)
}

// asIs returns how many of n bytes at off the inner backend can be asked for as they are; 0: a
// bounce is needed, which covers the rest in one piece if it is long enough.
func (b *Backend) asIs(off int64, n int) int {
	whole := b.down(int64(n))
	if off != b.down(off) || whole != int64(n) && b.up(int64(n)) <= b.bounces.size {
		return 0
	}
	return int(whole)
}

// around returns the blocks around n bytes at off, as far as a bounce reaches.
func (b *Backend) around(off, n int64) (lo, hi int64) {
	lo = b.down(off)
	return lo, min(b.up(off+n), lo+b.bounces.size)
}

// readSome reads the first bytes of p, at least one.
func (b *Backend) readSome(ctx context.Context, p []byte, off int64) (int, error) {
	if n := b.asIs(off, len(p)); n > 0 {
		return n, b.readInner(ctx, p[:n], off)
	}
	m, err := b.bounces.borrow(ctx)
	if err != nil {
		return 0, err
	}
	defer b.bounces.giveBack(m)
	lo, hi := b.around(off, int64(len(p)))
	if err := b.readInner(ctx, m.p[:hi-lo], lo); err != nil {
		return 0, err
	}
	return copy(p, m.p[off-lo:hi-lo]), nil
}

// writePart writes the first of n bytes at off, with the rest of their blocks as it is: those of p,
// or zeros if that is nil. The caller has a claim to the blocks.
func (b *Backend) writePart(ctx context.Context, p []byte, n, off int64, fua bool) (int, error) {
	m, err := b.bounces.borrow(ctx)
	if err != nil {
		return 0, err
	}
	defer b.bounces.giveBack(m)
	lo, hi := b.around(off, n)
	n = min(n, hi-off)
	blocks := m.p[:hi-lo]
	head, tail := off > lo, off+n < hi
	if head {
		if err := b.readInner(ctx, blocks[:b.unit], lo); err != nil {
			return 0, err
		}
	}
	if last := hi - b.unit; tail && !(head && last == lo) {
		if err := b.readInner(ctx, blocks[last-lo:], last); err != nil {
			return 0, err
		}
	}
	if change := blocks[off-lo:][:n]; p == nil {
		clear(change)
	} else {
		copy(change, p)
	}
	return int(n), b.writeInner(ctx, blocks, lo, fua)
}

// readInner reads whole blocks.
func (b *Backend) readInner(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if r := b.inner.ReadContext; r != nil {
		n, err = r.ReadAtContext(ctx, p, off)
	} else {
		n, err = b.inner.ReadAt(p, off)
	}
	return complete(n, len(p), err)
}

// writeInner writes whole blocks.
func (b *Backend) writeInner(ctx context.Context, p []byte, off int64, fua bool) error {
	var n int
	var err error
	switch w := b.inner.WriteContext; {
	case fua:
		n, err = b.inner.FUAWriter.WriteAtFUA(p, off)
	case w != nil:
		n, err = w.WriteAtContext(ctx, p, off)
	default:
		n, err = b.inner.WriterAt.WriteAt(p, off)
	}
	return complete(n, len(p), err)
}

// complete is the error of a call that was to transfer want bytes.
func complete(n, want int, err error) error {
	switch {
	case n == want:
		return nil
	case err == nil, errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}
