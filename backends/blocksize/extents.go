package blocksize

import "github.com/nbdctl/nbdctl/backends"

// Cache implements backends.Cacher.
func (b *Backend) Cache(off, n int64) error {
	lo, hi := b.down(off), b.up(off+n)
	return b.inner.Cacher.Cache(lo, hi-lo)
}

// Extents implements backends.Extenter.
func (b *Backend) Extents(off, n int64, yield func(backends.Extent) bool) error {
	lo, hi := b.down(off), b.up(off+n)
	return b.inner.Extenter.Extents(lo, hi-lo, func(e backends.Extent) bool {
		e.Offset, e.Length = cut(e.Offset, e.Length, off, off+n)
		return e.Length == 0 || yield(e)
	})
}

// Contexts implements backends.Contexter.
func (b *Backend) Contexts() []backends.Context { return b.inner.Contexter.Contexts() }

// ContextExtents implements backends.Contexter.
func (b *Backend) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	lo, hi := b.down(off), b.up(off+n)
	return b.inner.Contexter.ContextExtents(name, lo, hi-lo, func(m backends.Mark) bool {
		m.Offset, m.Length = cut(m.Offset, m.Length, off, off+n)
		return m.Length == 0 || yield(m)
	})
}

// cut returns what of n bytes at off is within from and to.
func cut(off, n, from, to int64) (int64, int64) {
	lo, hi := max(off, from), min(off+n, to)
	return lo, max(hi-lo, 0)
}
