//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
)

// allocateSize bounds one fallocate, which starts over when a signal comes.
const allocateSize = 1 << 20

const punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE

// A memfdStore keeps the device in an unnamed file in memory, and in another one
// a bit for every chunk, "holds content". Being files, they can be passed to
// another process, and grow.
//
// The order of things keeps this true: where the bit is clear, and no write is in
// flight, the chunk is zeros and occupies no memory.
//
//   - A write allocates the chunk, copies, then sets the bit, then returns, also
//     when the copy failed half-way.
//   - A trim clears the bit, then drops the memory. The other way round, old
//     bytes could come back to life with a neighbour's write.
//
// A chunk is dropped only by a trim of the whole of it. A write to it at the same
// time overlaps, and which of the two wins is undefined: at worst the bit stays
// set on a chunk without memory, which then comes from page faults, within the
// limit but not from fallocate.
//
// Chunks are allocated by fallocate, which says ENOSPC where a page fault could
// only kill. Holes are answered from the bit, because reading them through a
// mapping would allocate them.
//
// Nothing is ever unmapped or moved while the store can be reached, so what a
// reply refers to is always readable, and always the same place of the device.
type memfdStore struct {
	limit  *limit
	data   *memfd
	bits   *memfd
	extent atomic.Pointer[extent]

	// maps is a separate object for the cleanup's sake, which must not hold on
	// to the store.
	maps *mappings
}

// An extent is how far the store reaches. It is replaced when the device grows.
// Who has an older one is at requests inside of that, and sees the same content
// and the same bits: only the table of windows and the mapping of the bits are
// others.
type extent struct {
	chunks  int64
	bits    bitmap
	windows []atomic.Pointer[window]
}

func newStore(size int64, l *limit) (store, error) { return newMemfdStore(size, l) }

func newMemfdStore(size int64, l *limit) (_ *memfdStore, err error) {
	s := &memfdStore{limit: l, maps: new(mappings)}
	s.extent.Store(new(extent))
	runtime.AddCleanup(s, (*mappings).unmap, s.maps)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.data.close(), s.bits.close())
		}
	}()
	if s.data, err = createMemfd(); err != nil {
		return nil, err
	}
	if s.bits, err = createMemfd(); err != nil {
		return nil, err
	}
	if err := s.grow(size); err != nil {
		return nil, err
	}
	return s, nil
}

// overhead is the length in bytes of the bitmap, in whole chunks so that it can
// be mapped whatever the page size.
func (e *extent) overhead() int64 {
	if e.chunks == 0 {
		return 0
	}
	return (e.chunks/8/chunkSize + 1) * chunkSize
}

func (s *memfdStore) grow(size int64) error {
	s.maps.mu.Lock()
	defer s.maps.mu.Unlock()
	old := s.extent.Load()
	e := &extent{chunks: (size-1)/chunkSize + 1, bits: old.bits}
	if e.chunks <= old.chunks {
		return nil // It was as long as that before.
	}
	if more := e.overhead() - old.overhead(); more > 0 {
		if err := s.limit.take(more); err != nil {
			return err
		}
		if err := s.mapBits(e, old.overhead()); err != nil {
			s.limit.give(more)
			return err
		}
	}
	if err := s.data.truncate(e.chunks * chunkSize); err != nil {
		return err
	}
	e.windows = make([]atomic.Pointer[window], (e.chunks-1)/windowChunks+1)
	for i := range old.windows {
		e.windows[i].Store(old.windows[i].Load())
	}
	s.extent.Store(e)
	return nil
}

// mapBits makes the bits of e, of which the first have bytes are there.
func (s *memfdStore) mapBits(e *extent, have int64) error {
	end := e.overhead()
	if err := s.bits.truncate(end); err != nil {
		return err
	}
	for at := have; at < end; at += allocateSize {
		if err := s.bits.fallocate(0, at, min(allocateSize, end-at)); err != nil {
			return errors.Join(err, s.bits.fallocate(punchHole, have, end-have))
		}
	}
	p, err := s.maps.add(s.bits, 0, end)
	if err != nil {
		return errors.Join(fmt.Errorf("mmap: %w", err), s.bits.fallocate(punchHole, have, end-have))
	}
	e.bits = bitmapIn(p)
	return nil
}

// bitmapIn returns the bitmap that lies in memory that is mapped.
func bitmapIn(p []byte) bitmap {
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&p[0])), len(p)/8)
}

// run returns how many bytes from off on, at most n, are all content or all hole.
func (s *memfdStore) run(off, n int64) (length int64, used bool) {
	lo, hi := span(off, n)
	c, used := s.extent.Load().bits.run(lo, hi)
	return min((lo+c)*chunkSize-off, n), used
}

// span returns the chunks that a range touches.
func span(off, n int64) (lo, hi int64) {
	return off / chunkSize, (off+n-1)/chunkSize + 1
}

func (s *memfdStore) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		n, used := s.run(off, int64(len(p)))
		if !used {
			clear(p[:n])
		} else {
			var b []byte
			if b, n = s.at(off, n); b != nil {
				copy(p, b)
			} else if _, err := s.data.ReadAt(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+n
	}
	runtime.KeepAlive(s)
	return nil
}

func (s *memfdStore) readTo(w backends.Reply, off, n int64) error {
	for n > 0 {
		length, used := s.run(off, n)
		if !used {
			w.Zeros(int(length))
		} else {
			var b []byte
			if b, length = s.at(off, length); b == nil {
				return backends.ErrWouldBlock
			}
			w.Bytes(b)
		}
		off, n = off+length, n-length
	}
	return nil
}

func (s *memfdStore) writeAt(p []byte, off int64) error {
	lo, hi := span(off, int64(len(p)))
	taken, err := s.allocate(lo, hi)
	if err != nil {
		return err
	}
	err = s.copyIn(p, off, taken > 0)
	s.mark(lo, hi, taken)
	return err
}

// copyIn copies p to the device. Fresh memory is filled through the file and then
// mapped at once, which spares a page fault for every page.
func (s *memfdStore) copyIn(p []byte, off int64, fresh bool) error {
	if fresh {
		_, err := s.data.WriteAt(p, off)
		s.populate(off, int64(len(p)))
		return err
	}
	for len(p) > 0 {
		b, n := s.at(off, int64(len(p)))
		if b != nil {
			copy(b, p)
		} else if _, err := s.data.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	runtime.KeepAlive(s)
	return nil
}

func (s *memfdStore) writeFrom(r backends.Payload, off, n int64) error {
	lo, hi := span(off, n)
	if c, used := s.extent.Load().bits.run(lo, hi); !used || c < hi-lo {
		return backends.ErrWouldBlock
	}
	// Windows may be without addresses, which has to come out before the first
	// byte is taken.
	for at, left := off, n; left > 0; {
		b, length := s.at(at, left)
		if b == nil {
			return backends.ErrWouldBlock
		}
		at, left = at+length, left-length
	}
	var err error
	for at, left := off, n; left > 0 && err == nil; {
		b, length := s.at(at, left)
		err = r.Into(b)
		at, left = at+length, left-length
	}
	s.mark(lo, hi, 0) // the whole span: what did arrive must stay
	runtime.KeepAlive(s)
	return err
}

// populate has the pages of the chunks that a range touches mapped, which are
// allocated. Where that fails, as before Linux 5.14, page faults will do it.
func (s *memfdStore) populate(off, n int64) {
	lo, hi := span(off, n)
	for at, end := lo*chunkSize, hi*chunkSize; at < end; {
		b, length := s.at(at, end-at)
		if b != nil {
			_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE)
		}
		at += length
	}
	runtime.KeepAlive(s)
}

// allocate makes room for the chunks from lo to hi that have no content, and
// returns how many bytes it took for them.
func (s *memfdStore) allocate(lo, hi int64) (taken int64, err error) {
	for c := lo; c < hi; {
		n, used := s.extent.Load().bits.run(c, min(hi, c+allocateSize/chunkSize))
		if !used {
			if err = s.limit.take(n * chunkSize); err == nil {
				taken += n * chunkSize
				err = s.data.fallocate(0, c*chunkSize, n*chunkSize)
			}
		}
		if err != nil {
			// What was allocated so far cannot be taken back: another write may be
			// at it by now. It stays, as zeros.
			s.mark(lo, c, taken)
			return 0, err
		}
		c += n
	}
	return taken, nil
}

// mark sets the bits of chunks for which taken bytes were allocated, and settles
// the difference: another write may have been first, or a trim have cleared more.
func (s *memfdStore) mark(lo, hi, taken int64) {
	if d := taken - s.extent.Load().bits.set(lo, hi)*chunkSize; d != 0 {
		s.limit.give(d)
	}
}

func (s *memfdStore) trim(off, n int64, last bool) error {
	end := off + n
	// The chunks wholly inside; the device's last one may be short.
	lo, hi := (off+chunkSize-1)/chunkSize, end/chunkSize
	if last {
		hi = (end-1)/chunkSize + 1
	}
	if lo >= hi {
		return s.wipe(off, n)
	}
	if err := s.wipe(off, lo*chunkSize-off); err != nil {
		return err
	}
	if err := s.drop(lo, hi); err != nil {
		return err
	}
	return s.wipe(hi*chunkSize, end-hi*chunkSize)
}

// drop gives back the memory of the chunks from lo to hi.
func (s *memfdStore) drop(lo, hi int64) error {
	cleared := s.extent.Load().bits.clear(lo, hi) * chunkSize
	if cleared == 0 {
		return nil
	}
	err := s.data.fallocate(punchHole, lo*chunkSize, (hi-lo)*chunkSize)
	if err != nil {
		s.mark(lo, hi, cleared) // which is always safe: content, or zeros
		return err
	}
	s.limit.give(cleared)
	return nil
}

// wipe makes zeros in place of content. Holes have them already.
func (s *memfdStore) wipe(off, n int64) error {
	for n > 0 {
		length, used := s.run(off, n)
		if used {
			b, l := s.at(off, min(length, allocateSize))
			if b == nil {
				if _, err := s.data.WriteAt(make([]byte, l), off); err != nil {
					return err
				}
			}
			clear(b)
			length = l
		}
		off, n = off+length, n-length
	}
	runtime.KeepAlive(s)
	return nil
}

func (s *memfdStore) fill(off, n int64) error {
	lo, hi := span(off, n)
	taken, err := s.allocate(lo, hi)
	if err != nil {
		return err
	}
	err = s.wipe(off, n)
	s.mark(lo, hi, taken)
	return err
}

func (s *memfdStore) used() int64 {
	return s.limit.inUse() - s.extent.Load().overhead()
}

// close drops the memory and closes the files. The mappings go with the store.
func (s *memfdStore) close() error {
	e := s.extent.Load()
	cleared := e.bits.clear(0, e.chunks)
	err := errors.Join(
		s.data.fallocate(punchHole, 0, e.chunks*chunkSize),
		s.bits.fallocate(punchHole, 0, e.overhead()),
	)
	s.limit.give(cleared * chunkSize)
	return errors.Join(err, s.data.close(), s.bits.close())
}
