package backendtest

import "github.com/nbdctl/nbdctl/backends"

// What outlives a crash, and a change of size.

type syncsNothing struct{ *disk }

func (*syncsNothing) Sync() error { return nil }

func (b *syncsNothing) WriteAtFUA(p []byte, off int64) (int, error) { return b.WriteAt(p, off) }

type fuaIsPlain struct{ *disk }

func (b *fuaIsPlain) WriteAtFUA(p []byte, off int64) (int, error) { return b.WriteAt(p, off) }

type shrinksOnReopen struct{ *disk }

type resizeKeepsTail struct {
	*disk
	all []byte
}

func (b *resizeKeepsTail) Resize(size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.all) < len(b.data) {
		b.all = append(make([]byte, 0, 1<<20), b.data...)
	}
	copy(b.all, b.data)
	b.data = b.all[:size:cap(b.all)]
	b.all = b.all[:cap(b.all)]
	b.hole = make([]bool, size)
	return nil
}

type resizeForgets struct{ *disk }

func (*resizeForgets) Resize(size int64) error { return nil }

// Contexts.

type contextsNone struct{ *disk }

func (*contextsNone) Contexts() []backends.Context { return nil }

type contextsWide struct{ *disk }

func (*contextsWide) Contexts() []backends.Context { return []backends.Context{{Name: "x-test:at"}} }

type contextsGap struct{ *disk }

func (b *contextsGap) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	return b.disk.ContextExtents(name, off, n, func(m backends.Mark) bool {
		m.Offset++
		return yield(m)
	})
}

type contextsEarly struct{ *disk }

func (b *contextsEarly) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	return b.disk.ContextExtents(name, off, n/2, yield)
}
