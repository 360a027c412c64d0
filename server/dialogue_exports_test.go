package server_test

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A dialogueExport makes an export that dialogues are about, by the word for it in their heads.
// testdata/dialogues/README.md describes each.
type dialogueExport struct {
	name    string
	backend func() backends.Backend
	options server.Options
}

const diskLetters = "abcdefgh        "

var (
	described = server.Options{Description: "a disk ☺"}
	readOnly  = server.Options{BlockSize: 512, ReadOnly: true}

	dialogueExports = map[string]dialogueExport{
		"default":   {name: "", backend: func() backends.Backend { return lettered(diskLetters) }},
		"disk":      {"disk", func() backends.Backend { return lettered(diskLetters) }, described},
		"read-only": {"read-only", func() backends.Backend { return lettered("ab") }, readOnly},
		"blocks":    {name: "blocks", backend: func() backends.Backend { return blocky{lettered(diskLetters)} }},
		"failing":   {name: "failing", backend: newFailing},
		"sparse":    {name: "sparse", backend: func() backends.Backend { return holey() }},
		"marked":    {name: "marked", backend: func() backends.Backend { return marked() }},
		"big":       {name: "big", backend: func() backends.Backend { return zeroDisk(1 << 50) }},
		"huge":      {name: "huge", backend: func() backends.Backend { return zeroDisk(1<<63 - 1) }},
		"speckled":  {name: "speckled", backend: func() backends.Backend { return speckled(0) }},
		"narrow":    {name: "narrow", backend: func() backends.Backend { return speckled(4096) }},
	}
)

// A letteredDisk is a backend in memory that can do everything. It has pages that are full of one
// letter each, and holes.
type letteredDisk struct {
	fails  []error // of whatever is done to a page; nil: that does not fail
	unsure error   // of Sync

	mu    sync.Mutex // guards the one below
	pages [][]byte   // nil: a hole
}

// lettered makes a disk of a page for each letter. A space stands for a hole.
func lettered(letters string) *letteredDisk {
	d := &letteredDisk{pages: make([][]byte, len(letters)), fails: make([]error, len(letters))}
	for i := range letters {
		if letters[i] != ' ' {
			d.pages[i] = bytes.Repeat([]byte{letters[i]}, page)
		}
	}
	return d
}

// errPanic has a page panic instead of failing.
var errPanic = errors.New("a panic")

// newFailing makes a disk whose pages fail, each in its own way, but the first, and whose Sync
// does.
func newFailing() backends.Backend {
	d := lettered("abcdefghijklmnop")
	d.unsure = syscall.EIO
	d.fails = []error{
		nil, syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC, syscall.EOVERFLOW,
		syscall.EOPNOTSUPP, syscall.ESHUTDOWN, syscall.EROFS, syscall.EACCES, syscall.EDQUOT, syscall.EFBIG,
		errors.New("an error without a number"), io.ErrUnexpectedEOF, errPanic,
	}
	return d
}

func (d *letteredDisk) Size() int64 { return int64(len(d.pages)) * page }

// each calls f for the parts of pages in a range, up to the first that fails, and returns how many
// bytes these were.
func (d *letteredDisk) each(off, n int64, f func(p *[]byte, from, m int64)) (done int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n > 0 {
		i, from := off/page, off%page
		m := min(n, page-from)
		switch err := d.fails[i]; err {
		case nil:
		case errPanic:
			panic(err)
		default:
			return done, err
		}
		f(&d.pages[i], from, m)
		off, n, done = off+m, n-m, done+int(m)
	}
	return done, nil
}

func (d *letteredDisk) ReadAt(p []byte, off int64) (int, error) {
	at := p
	return d.each(off, int64(len(p)), func(data *[]byte, from, m int64) {
		if *data == nil {
			clear(at[:m])
		} else {
			copy(at, (*data)[from:from+m])
		}
		at = at[m:]
	})
}

// ReadAtTo has a run of holes be one, and leaves what fails, or belongs to another run, to ReadAt.
func (d *letteredDisk) ReadAtTo(r backends.Reply, off int64, n int) error {
	for i := off / page; i < (off+int64(n)+page-1)/page; i++ {
		if d.fails[i] != nil {
			return backends.ErrWouldBlock
		}
	}
	zeroes := 0
	_, err := d.each(off, int64(n), func(data *[]byte, from, m int64) {
		if *data == nil {
			zeroes += int(m)
			return
		}
		if zeroes > 0 {
			r.Zeros(zeroes)
			zeroes = 0
		}
		r.Bytes(bytes.Clone((*data)[from : from+m]))
	})
	if zeroes > 0 {
		r.Zeros(zeroes)
	}
	return err
}

func (d *letteredDisk) WriteAt(p []byte, off int64) (int, error) {
	return d.each(off, int64(len(p)), func(data *[]byte, from, m int64) {
		if *data == nil {
			*data = make([]byte, page)
		}
		copy((*data)[from:], p[:m])
		p = p[m:]
	})
}

func (d *letteredDisk) Sync() error { return d.unsure }

func (d *letteredDisk) Trim(off, n int64) error { return d.Zero(off, n, 0) }

func (d *letteredDisk) Zero(off, n int64, flags backends.ZeroFlags) error {
	_, err := d.each(off, n, func(data *[]byte, from, m int64) {
		switch {
		case flags&backends.ZeroNoHole != 0 && *data == nil:
			*data = make([]byte, page)
		case flags&backends.ZeroNoHole == 0 && m == page:
			*data = nil
		case *data != nil:
			clear((*data)[from : from+m])
		}
	})
	return err
}

func (d *letteredDisk) Cache(off, n int64) error {
	_, err := d.each(off, n, func(*[]byte, int64, int64) {})
	return err
}

func (d *letteredDisk) Extents(off, n int64, yield func(backends.Extent) bool) error {
	stop := false
	_, err := d.each(off, n, func(data *[]byte, from, m int64) {
		stop = stop || !yield(backends.Extent{Offset: off, Length: m, Hole: *data == nil, Zero: *data == nil})
		off += m
	})
	return err
}

// blocky is a disk that can do nothing but be read and written, in blocks of 512 bytes, 8192 bytes
// at once.
type blocky struct{ d *letteredDisk }

func (b blocky) Size() int64                              { return b.d.Size() }
func (b blocky) ReadAt(p []byte, off int64) (int, error)  { return b.d.ReadAt(p, off) }
func (b blocky) WriteAt(p []byte, off int64) (int, error) { return b.d.WriteAt(p, off) }
func (b blocky) BlockSizes() backends.BlockSizes {
	return backends.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 8192}
}

// zeroDisk is a disk of that size, in bytes, that reads as zeroes, whatever is written. Its first
// half is data.
type zeroDisk int64

func (d zeroDisk) Size() int64                                 { return int64(d) }
func (d zeroDisk) WriteAt(p []byte, _ int64) (int, error)      { return len(p), nil }
func (d zeroDisk) Trim(_, _ int64) error                       { return nil }
func (d zeroDisk) Zero(_, _ int64, _ backends.ZeroFlags) error { return nil }
func (d zeroDisk) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (d zeroDisk) ReadAtTo(r backends.Reply, _ int64, n int) error {
	r.Zeros(n)
	return nil
}

func (d zeroDisk) Extents(off, n int64, yield func(backends.Extent) bool) error {
	half := int64(d) / 2
	data := max(0, min(n, half-off))
	if data > 0 && !yield(backends.Extent{Offset: off, Length: data}) || data == n {
		return nil
	}
	yield(backends.Extent{Offset: off + data, Length: n - data, Hole: true, Zero: true})
	return nil
}

// speckled is a read-only disk of 8 MiB, of blocks of 512 bytes, every other of which is a hole.
// All of it reads as zeroes. A READ is of that many bytes at most, unless it is 0.
type speckled int

func (d speckled) Size() int64 { return 8 << 20 }

func (d speckled) BlockSizes() backends.BlockSizes {
	return backends.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: int(d)}
}

func (d speckled) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (d speckled) Extents(off, n int64, yield func(backends.Extent) bool) error {
	for end := off + n; off < end; off += 512 {
		hole := off/512%2 == 1
		if !yield(backends.Extent{Offset: off, Length: 512, Hole: hole, Zero: hole}) {
			break
		}
	}
	return nil
}

// A heldDisk is a disk of one page whose reads wait until they are released.
type heldDisk struct {
	entered, released chan struct{}
	once              sync.Once
}

func newHeldDisk(t testing.TB) *heldDisk {
	d := &heldDisk{entered: make(chan struct{}, 1), released: make(chan struct{})}
	t.Cleanup(d.release)
	return d
}

func (d *heldDisk) release() { d.once.Do(func() { close(d.released) }) }

func (d *heldDisk) Size() int64 { return page }

func (d *heldDisk) ReadAt(p []byte, _ int64) (int, error) {
	d.entered <- struct{}{}
	<-d.released
	return copy(p, bytes.Repeat([]byte{'a'}, len(p))), nil
}
