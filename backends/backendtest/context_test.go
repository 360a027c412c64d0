package backendtest

import (
	"context"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// A stallable backend can be made to hang.
type stallable interface{ stall() (release func()) }

// A contextDisk is a disk behind something that may hang.
type contextDisk struct {
	*disk
	stalled chan struct{} // nil: it does not hang
}

var _ interface {
	backends.ReaderAtContext
	backends.WriterAtContext
} = (*contextDisk)(nil)

func newContextDisk(size int) *contextDisk { return &contextDisk{disk: newDisk(size)} }

func (d *contextDisk) stall() (release func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stalled := make(chan struct{})
	d.stalled = stalled
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.stalled = nil
		close(stalled)
	})
}

// wait returns when the disk does not hang any more, or with the error of ctx.
func (d *contextDisk) wait(ctx context.Context) error {
	d.mu.Lock()
	stalled := d.stalled
	d.mu.Unlock()
	if stalled == nil {
		return nil
	}
	select {
	case <-stalled:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *contextDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	return d.ReadAt(p, off)
}

func (d *contextDisk) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	return d.WriteAt(p, off)
}

type contextOther struct{ *contextDisk }

func (b *contextOther) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := b.contextDisk.ReadAtContext(ctx, p, off)
	p[0]++
	return n, err
}

type contextShort struct{ *contextDisk } // that it gave up is no error

func (b *contextShort) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if b.wait(ctx) != nil {
		return 0, nil
	}
	return b.ReadAt(p, off)
}

type contextDeaf struct{ *contextDisk }

func (b *contextDeaf) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	return b.contextDisk.ReadAtContext(context.Background(), p, off)
}

type contextLoses struct{ *contextDisk }

func (b *contextLoses) WriteAtContext(_ context.Context, p []byte, _ int64) (int, error) {
	return len(p), nil
}

// contextLate lets go of its callers, and not of their writes.
type contextLate struct {
	*contextDisk
	late []byte
}

func (b *contextLate) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	err := b.wait(ctx)
	if err == nil {
		return b.WriteAt(p, off)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.late = p
	return 0, err
}

func (b *contextLate) ReadAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	late := b.late
	b.mu.Unlock()
	if late != nil && off == 0 {
		b.WriteAt(late, 0) // as if it had arrived at this moment
	}
	return b.disk.ReadAt(p, off)
}
