package blocksize_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// A disk is an inner backend that takes whole blocks only, and loses in a crash what was not
// synced.
type disk struct {
	sizes backends.BlockSizes
	caps  backends.Caps

	mu     sync.Mutex
	data   []byte
	stable []byte
	wrong  error         // the first request that it should not have got
	calls  []string      // what was asked for, if it is to be noted
	note   bool          // it is
	stall  chan struct{} // unless nil: what reads and writes wait for
	before func(op string, off, n int64) error
}

const all = ^backends.Caps(0)

func newDisk(size int, sizes backends.BlockSizes, caps backends.Caps) *disk {
	return &disk{sizes: sizes, caps: caps, data: make([]byte, size), stable: make([]byte, size)}
}

func (d *disk) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.data))
}

func (d *disk) BlockSizes() backends.BlockSizes { return d.sizes }
func (d *disk) Caps() backends.Caps             { return d.caps }

// request begins one, and leaves the disk locked unless there is an error.
func (d *disk) request(op string, off, n int64, limited bool) error {
	runtime.Gosched() // Others may come in between.
	if d.before != nil {
		if err := d.before(op, off, n); err != nil {
			return err
		}
	}
	d.mu.Lock()
	if d.note {
		d.calls = append(d.calls, fmt.Sprint(op, " ", off, "+", n))
	}
	unit := int64(max(d.sizes.Minimum, 1))
	maximum := int64(d.sizes.Maximum)
	if off < 0 || n < 0 || n == 0 && op != "cache" || off+n > int64(len(d.data)) || (off|n)%unit != 0 ||
		limited && maximum > 0 && n > maximum {
		err := fmt.Errorf("%s of %d bytes at %d of %d", op, n, off, len(d.data))
		if d.wrong == nil {
			d.wrong = err
		}
		d.mu.Unlock()
		return err
	}
	return nil
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.wait(context.Background()); err != nil {
		return 0, err
	}
	if err := d.request("read", off, int64(len(p)), true); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	n := copy(p, d.data[off:])
	if off+int64(n) == int64(len(d.data)) {
		return n, io.EOF // It is no error beside a full count.
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.wait(context.Background()); err != nil {
		return 0, err
	}
	if err := d.request("write", off, int64(len(p)), true); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *disk) WriteAtFUA(p []byte, off int64) (int, error) {
	if err := d.request("fua", off, int64(len(p)), true); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	copy(d.stable[off:], p)
	return copy(d.data[off:], p), nil
}

func (d *disk) wait(ctx context.Context) error {
	d.mu.Lock()
	stall := d.stall
	d.mu.Unlock()
	if stall == nil {
		return ctx.Err()
	}
	select {
	case <-stall:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	return d.ReadAt(p, off)
}

func (d *disk) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	return d.WriteAt(p, off)
}

func (d *disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.stable, d.data)
	return nil
}

func (d *disk) Trim(off, n int64) error {
	if err := d.request("trim", off, n, false); err != nil {
		return err
	}
	defer d.mu.Unlock()
	clear(d.data[off:][:n])
	return nil
}

func (d *disk) Zero(off, n int64, flags backends.ZeroFlags) error {
	if flags&backends.ZeroFast != 0 {
		return errors.ErrUnsupported
	}
	if err := d.request("zero", off, n, false); err != nil {
		return err
	}
	defer d.mu.Unlock()
	clear(d.data[off:][:n])
	return nil
}

func (d *disk) Cache(off, n int64) error {
	if err := d.request("cache", off, n, false); err != nil {
		return err
	}
	d.mu.Unlock()
	return nil
}

// Extents has pieces smaller than blocks, of which those are holes that are zeros.
func (d *disk) Extents(off, n int64, yield func(backends.Extent) bool) error {
	if err := d.request("extents", off, n, false); err != nil {
		return err
	}
	defer d.mu.Unlock()
	const piece = 4096
	for at := off; at < off+n; at += piece {
		n := min(piece, off+n-at)
		zero := len(bytes.Trim(d.data[at:][:n], "\x00")) == 0
		if !yield(backends.Extent{Offset: at, Length: n, Hole: zero, Zero: zero}) {
			return nil
		}
	}
	return nil
}

func (d *disk) Contexts() []backends.Context { return []backends.Context{{Name: "x-test:blocks"}} }

// ContextExtents marks each block with its number.
func (d *disk) ContextExtents(_ string, off, n int64, yield func(backends.Mark) bool) error {
	if err := d.request("context", off, n, false); err != nil {
		return err
	}
	defer d.mu.Unlock()
	unit := int64(max(d.sizes.Minimum, 512))
	for at := off; at < off+n; at += unit {
		if !yield(backends.Mark{Offset: at, Length: min(unit, off+n-at), Flags: uint64(at / unit)}) {
			return nil
		}
	}
	return nil
}
