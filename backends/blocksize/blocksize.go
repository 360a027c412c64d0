package blocksize

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nbdctl/nbdctl/backends"
)

// A Backend is another backend for requests of smaller blocks. It is safe for concurrent use. It
// has the abilities of the inner one, but for those that avoid copies or change the size.
type Backend struct {
	inner backends.Device
	block int   // bytes, of which requests are multiples
	unit  int64 // bytes, of which requests of inner are multiples; a power of two

	changes claims // to blocks that are being changed
	bounces bounces
}

var _ interface {
	backends.Backend
	io.WriterAt
	backends.Syncer
	backends.FUAWriter
	backends.Trimmer
	backends.Zeroer
	backends.Cacher
	backends.Extenter
	backends.Contexter
	backends.BlockSizer
	backends.Capper
	backends.ReaderAtContext
	backends.WriterAtContext
} = (*Backend)(nil)

// New returns inner for requests whose offsets and lengths are multiples of block, in bytes, which
// is a power of two. Nothing else must change inner as long as the Backend is used. Its Close is
// the caller's.
func New(inner backends.Backend, block int) (*Backend, error) {
	if inner == nil {
		return nil, errors.New("blocksize: no backend")
	}
	if block < 1 || block&(block-1) != 0 {
		return nil, fmt.Errorf("blocksize: %d is not a power of two", block)
	}
	b := &Backend{inner: backends.Probe(inner), block: block}
	b.unit = int64(max(b.inner.BlockSizes.Minimum, 1))
	size := max(bounceSize, b.unit)
	if maximum := int64(b.inner.BlockSizes.Maximum); maximum > 0 {
		size = min(size, maximum)
	}
	b.bounces.init(size)
	return b, nil
}

// Size returns the size of the inner backend, in whole blocks of that.
func (b *Backend) Size() int64 { return b.down(b.inner.Size()) }

// BlockSizes returns the block size of New as the minimum, and that of the inner backend as what is
// preferred, unless that prefers more.
func (b *Backend) BlockSizes() backends.BlockSizes {
	s := b.inner.BlockSizes
	return backends.BlockSizes{
		Minimum:   b.block,
		Preferred: max(b.block, s.Minimum, s.Preferred),
		Maximum:   s.Maximum,
	}
}

// Caps implements backends.Capper.
func (b *Backend) Caps() backends.Caps { return b.inner.Caps }

// Sync implements backends.Syncer.
func (b *Backend) Sync() error { return b.inner.Syncer.Sync() }

// Trim implements backends.Trimmer. It leaves blocks alone that are not covered as a whole.
func (b *Backend) Trim(off, n int64) error {
	lo, hi := b.up(off), b.down(off+n)
	if lo >= hi {
		return nil
	}
	c, err := b.changes.take(context.Background(), lo, hi, true)
	if err != nil {
		return err
	}
	defer b.changes.drop(c)
	return b.inner.Trimmer.Trim(lo, hi-lo)
}

// down and up round to whole blocks of the inner backend.
func (b *Backend) down(n int64) int64 { return n &^ (b.unit - 1) }
func (b *Backend) up(n int64) int64   { return b.down(n + b.unit - 1) }
