package backendtest

import (
	"errors"
	"io"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// A disk does everything right, and simply: one lock, a slice, and what of it
// would outlive a crash. The wrong disks of these tests embed it and get one thing
// wrong.
type disk struct {
	mu     sync.Mutex // guards the rest
	data   []byte
	stable []byte
	hole   []bool // byte by byte
}

var _ interface {
	backends.Backend
	io.WriterAt
	backends.Syncer
	backends.FUAWriter
	backends.Trimmer
	backends.Zeroer
	backends.Extenter
	backends.Cacher
	backends.Contexter
	backends.Resizer
	backends.ReaderAtTo
	backends.WriterAtFrom
} = (*disk)(nil)

func newDisk(size int) *disk {
	return &disk{data: make([]byte, size), stable: make([]byte, size), hole: make([]bool, size)}
}

func (d *disk) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.data))
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(p, d.data[off:])
	if int(off)+n == len(d.data) {
		return n, io.EOF // allowed, and what bytes.Reader does
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.hole[off:][:len(p)])
	return copy(d.data[off:], p), nil
}

func (d *disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.stable, d.data)
	return nil
}

func (d *disk) WriteAtFUA(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.hole[off:][:len(p)])
	copy(d.stable[off:], p)
	return copy(d.data[off:], p), nil
}

func (d *disk) Trim(off, n int64) error { return d.Zero(off, n, 0) }

func (d *disk) Zero(off, n int64, flags backends.ZeroFlags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off:][:n])
	for i := range d.hole[off:][:n] {
		d.hole[off:][i] = flags&backends.ZeroNoHole == 0
	}
	return nil
}

func (d *disk) Cache(off, n int64) error { return nil }

func (d *disk) Contexts() []backends.Context {
	return []backends.Context{{Name: "x-test:hole"}, {Name: "x-test:at", Wide: true}}
}

func (d *disk) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	return d.Extents(off, n, func(e backends.Extent) bool {
		m := backends.Mark{Offset: e.Offset, Length: e.Length}
		switch {
		case name == "x-test:at":
			m.Flags = uint64(e.Offset) << 32
		case e.Hole:
			m.Flags = 1
		}
		return yield(m)
	})
}

func (d *disk) Extents(off, n int64, yield func(backends.Extent) bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for end := off + n; off < end; {
		e := backends.Extent{Offset: off, Hole: d.hole[off], Zero: d.hole[off]}
		for off < end && d.hole[off] == e.Hole {
			off++
		}
		e.Length = off - e.Offset
		if !yield(e) {
			break
		}
	}
	return nil
}

func (d *disk) Resize(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = append(make([]byte, 0, size), d.data[:min(size, int64(len(d.data)))]...)[:size]
	d.stable = append(make([]byte, 0, size), d.stable[:min(size, int64(len(d.stable)))]...)[:size]
	d.hole = make([]bool, size)
	return nil
}

func (d *disk) ReadAtTo(w backends.Reply, off int64, n int) error {
	p := w.Buffer(n)
	if p == nil {
		return backends.ErrWouldBlock
	}
	d.ReadAt(p, off)
	return nil
}

func (d *disk) WriteAtFrom(r backends.Payload, off int64, n int) error {
	if n > 64<<10 {
		return backends.ErrWouldBlock
	}
	p := make([]byte, n)
	if err := r.Into(p); err != nil {
		return err
	}
	_, err := d.WriteAt(p, off)
	return err
}

// crash is what Options.Reopen does to a disk.
func (d *disk) crash() *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := newDisk(len(d.data))
	copy(after.data, d.stable)
	copy(after.stable, d.stable)
	return after
}

var errWrong = errors.New("wrong on purpose")
