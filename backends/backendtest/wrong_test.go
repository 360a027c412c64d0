package backendtest

import (
	"errors"
	"io"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/nbdctl/nbdctl/backends"
)

// What a backend says of itself.

type grows struct {
	*disk
	calls int64
}

func (b *grows) Size() int64 { b.calls++; return b.disk.Size() + b.calls - 1 }

type oddBlocks struct {
	*disk
	sizes backends.BlockSizes
}

func (b *oddBlocks) BlockSizes() backends.BlockSizes { return b.sizes }

type fickle struct {
	*disk
	probed bool
}

func (b *fickle) Caps() backends.Caps {
	if b.probed = !b.probed; b.probed {
		return ^backends.Caps(0)
	}
	return backends.CapWrite
}

type syncFails struct{ *disk }

func (*syncFails) Sync() error { return errWrong }

// Reads.

type readsShort struct{ *disk }

func (b *readsShort) ReadAt(p []byte, off int64) (int, error) {
	return b.disk.ReadAt(p[:min(len(p), 512)], off)
}

type readsLess struct{ *disk } // an end of file in the middle

func (b *readsLess) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > diskSize/2 {
		return 0, io.EOF
	}
	return b.disk.ReadAt(p, off)
}

type readsTooMuch struct{ *disk }

func (b *readsTooMuch) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.disk.ReadAt(p, off)
	if n > 0 {
		*(*byte)(unsafe.Add(unsafe.Pointer(&p[n-1]), 1)) = 1
	}
	return n, err
}

type emptyFails struct{ *disk }

func (b *emptyFails) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, errWrong
	}
	return b.disk.ReadAt(p, off)
}

type noise struct {
	*disk
	reads int
}

func (b *noise) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.disk.ReadAt(p, off)
	if b.reads++; n > 0 {
		p[n-1] ^= byte(b.reads)
	}
	return n, err
}

// oneBuffer serves all reads from one buffer, with a lock that is let go in
// between.
type oneBuffer struct {
	*disk
	poison bool // or it just invents bytes under load
	active atomic.Int32
	buf    [maxRequest]byte
	from   int64
}

func (b *oneBuffer) ReadAt(p []byte, off int64) (int, error) {
	busy := b.active.Add(1) > 1
	defer b.active.Add(-1)
	b.mu.Lock()
	b.from = off
	n := copy(b.buf[:len(p)], b.data[off:])
	b.mu.Unlock()
	runtime.Gosched()
	b.mu.Lock()
	defer b.mu.Unlock()
	copy(p, b.buf[:n])
	if b.from != off && n > 0 { // as sure a sign as the bytes, which may be alike
		p[0] ^= 0xff
	}
	if b.poison && busy && n > 0 {
		p[0] = 0xfe
	}
	return n, nil
}

// Writes.

type writesShort struct{ *disk }

func (b *writesShort) WriteAt(p []byte, off int64) (int, error) {
	return b.disk.WriteAt(p[:min(len(p), 1)], off)
}

type losesLastByte struct{ *disk }

func (b *losesLastByte) WriteAt(p []byte, off int64) (int, error) {
	b.disk.WriteAt(p[:min(int64(len(p)), max(diskSize-1-off, 0))], off)
	return len(p), nil
}

type changesArgument struct{ *disk }

func (b *changesArgument) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.disk.WriteAt(p, off)
	if n > 0 {
		p[0]++
	}
	return n, err
}

// keepsArgument stores a write when the next one comes.
type keepsArgument struct {
	*disk
	kept []byte
	at   int64
}

func (b *keepsArgument) flush() { b.disk.WriteAt(b.kept, b.at); b.kept = nil }

func (b *keepsArgument) WriteAt(p []byte, off int64) (int, error) {
	b.flush()
	b.kept, b.at = p, off
	return len(p), nil
}

func (b *keepsArgument) ReadAt(p []byte, off int64) (int, error) {
	b.flush()
	return b.disk.ReadAt(p, off)
}

const page = 4096

// around returns the pages around a range.
func around(off, n int64) (lo, hi int64) {
	return off / page * page, (off + n + page - 1) / page * page
}

type wholePages struct{ *disk } // forgets to read before it modifies and writes

func (b *wholePages) WriteAt(p []byte, off int64) (int, error) {
	lo, hi := around(off, int64(len(p)))
	whole := make([]byte, hi-lo)
	copy(whole[off-lo:], p)
	b.disk.WriteAt(whole, lo)
	return len(p), nil
}

type forgetsAlignment struct{ *disk } // only where page and chunk meet, and long

func (b *forgetsAlignment) WriteAt(p []byte, off int64) (int, error) {
	if len(p) > 20000 && off < 64<<10 && off+int64(len(p)) > 64<<10 {
		b.disk.WriteAt(p[:64<<10-off], off)
		return len(p), nil
	}
	return b.disk.WriteAt(p, off)
}

type pagesUnlocked struct{ *disk } // reads, modifies and writes, without a lock across

func (b *pagesUnlocked) WriteAt(p []byte, off int64) (int, error) {
	lo, hi := around(off, int64(len(p)))
	whole := make([]byte, hi-lo)
	b.disk.ReadAt(whole, lo)
	runtime.Gosched()
	copy(whole[off-lo:], p)
	b.disk.WriteAt(whole, lo)
	return len(p), nil
}

// Zeros, trims and holes.

type zeroesNothing struct{ *disk }

func (*zeroesNothing) Zero(off, n int64, flags backends.ZeroFlags) error { return nil }

type zeroesUnsupported struct{ *disk } // after it has begun

func (b *zeroesUnsupported) Zero(off, n int64, flags backends.ZeroFlags) error {
	b.disk.Zero(off, 1, flags)
	return errors.ErrUnsupported
}

type zeroesWholePages struct{ *disk }

func (b *zeroesWholePages) Zero(off, n int64, flags backends.ZeroFlags) error {
	lo, hi := around(off, n)
	return b.disk.Zero(lo, hi-lo, flags)
}

type zeroesInside struct{ *disk } // punches whole pages and forgets the edges

func (b *zeroesInside) Zero(off, n int64, flags backends.ZeroFlags) error {
	lo, hi := (off+page-1)/page*page, (off+n)/page*page
	return b.disk.Zero(lo, max(hi-lo, 0), flags)
}

type zeroesFastByHalf struct{ *disk } // and finds out then that it is not quick

func (b *zeroesFastByHalf) Zero(off, n int64, flags backends.ZeroFlags) error {
	if flags&backends.ZeroFast != 0 {
		b.disk.Zero(off, n/2, flags)
		return errors.ErrUnsupported
	}
	return b.disk.Zero(off, n, flags)
}

type cacheFails struct{ *disk }

func (*cacheFails) Cache(off, n int64) error { return errWrong }

type cacheForgets struct{ *disk }

func (b *cacheForgets) Cache(off, n int64) error { return b.disk.Zero(off, n, 0) }

type trimsToGarbage struct{ *disk }

func (b *trimsToGarbage) Trim(off, n int64) error {
	b.WriteAt([]byte{b.data[off] + 1}, off)
	return nil
}

type trimsWholePages struct{ *disk }

func (b *trimsWholePages) Trim(off, n int64) error {
	lo, hi := around(off, n)
	return b.disk.Trim(lo, hi-lo)
}

// change gives every extent another form.
func (d *disk) change(off, n int64, yield func(backends.Extent) bool, change func(*backends.Extent)) error {
	return d.Extents(off, n, func(e backends.Extent) bool {
		change(&e)
		return yield(e)
	})
}

type extentsGap struct{ *disk }

func (b *extentsGap) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return b.change(off, n, yield, func(e *backends.Extent) { e.Offset++ })
}

type extentsEarly struct{ *disk }

func (b *extentsEarly) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return b.disk.Extents(off, n/2, yield)
}

type extentsOutside struct{ *disk } // in whole pages, not cut to what was asked

func (b *extentsOutside) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return b.disk.Extents(off/page*page, n+off%page, yield)
}

type extentsLie struct{ *disk }

func (b *extentsLie) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return b.change(off, n, yield, func(e *backends.Extent) { e.Zero = true })
}

type extentsDeaf struct{ *disk }

func (b *extentsDeaf) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return b.disk.Extents(off, n, func(e backends.Extent) bool {
		yield(e)
		return true
	})
}

// The fast path.

type repliesOther struct{ *disk }

func (b *repliesOther) ReadAtTo(w backends.Reply, off int64, n int) error {
	w.Zeros(n)
	return nil
}

type repliesLess struct{ *disk }

func (b *repliesLess) ReadAtTo(w backends.Reply, off int64, n int) error {
	return b.disk.ReadAtTo(w, off, n-1)
}

type repliesReused struct {
	*disk
	buf [maxRequest]byte
}

func (b *repliesReused) ReadAtTo(w backends.Reply, off int64, n int) error {
	b.ReadAt(b.buf[:n], off)
	w.Bytes(b.buf[:n])
	return nil
}

type repliesWrapped struct{ *disk }

func (b *repliesWrapped) ReadAtTo(w backends.Reply, off int64, n int) error {
	return errors.Join(errWrong, backends.ErrWouldBlock)
}

type takesLess struct{ *disk }

func (b *takesLess) WriteAtFrom(r backends.Payload, off int64, n int) error {
	return b.disk.WriteAtFrom(r, off, n-1)
}

type takesMore struct{ *disk }

func (b *takesMore) WriteAtFrom(r backends.Payload, off int64, n int) error {
	b.disk.WriteAtFrom(r, off, n)
	return r.Into(make([]byte, 1))
}

type takesThenBlocks struct{ *disk }

func (b *takesThenBlocks) WriteAtFrom(r backends.Payload, off int64, n int) error {
	r.Into(make([]byte, 1))
	return backends.ErrWouldBlock
}

type swallowsInto struct{ *disk }

func (b *swallowsInto) WriteAtFrom(r backends.Payload, off int64, n int) error {
	if err := b.disk.WriteAtFrom(r, off, n); err == backends.ErrWouldBlock {
		return err
	}
	return nil
}

type storesUnfilled struct{ *disk } // what a pooled buffer held before

func (b *storesUnfilled) WriteAtFrom(r backends.Payload, off int64, n int) error {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i)
	}
	err := r.Into(p)
	b.WriteAt(p, off)
	return err
}
