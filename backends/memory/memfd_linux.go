//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
)

// allocateSize bounds one fallocate, which starts over when a signal comes.
const allocateSize = 1 << 20

const punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE

// A memfdStore keeps the device in an unnamed file in memory, followed by one bit
// for every chunk, "holds content". Being a file, it can be passed to another
// process.
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
// set on a chunk without memory, which then comes from page faults, in the
// budget but not from fallocate.
//
// Chunks are allocated by fallocate, which says ENOSPC where a page fault could
// only kill. Holes are answered from the bit, because reading them through a
// mapping would allocate them.
//
// Nothing is ever unmapped or moved while the store can be reached, so what a
// reply refers to is always readable, and always the same place of the device.
type memfdStore struct {
	size   int64
	chunks int64
	budget *budget
	file   *os.File
	raw    syscall.RawConn // of file
	bits   bitmap          // in maps.bits

	// maps is a separate object for the cleanup's sake, which must not hold on
	// to the store.
	maps *mappings
}

func newStore(size int64, b *budget) (store, error) { return newMemfdStore(size, b) }

func newMemfdStore(size int64, b *budget) (*memfdStore, error) {
	s := &memfdStore{size: size, chunks: (size-1)/chunkSize + 1, budget: b}
	if err := b.take(s.overhead()); err != nil {
		return nil, err
	}
	fd, err := createMemfd()
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	s.file = os.NewFile(uintptr(fd), "memfd:nbdctl")
	if err := s.setUp(fd); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	runtime.AddCleanup(s, (*mappings).unmap, s.maps)
	return s, nil
}

// overhead is the length in bytes of the bitmap, in whole chunks so that it can
// be mapped whatever the page size.
func (s *memfdStore) overhead() int64 {
	return (s.chunks/8/chunkSize + 1) * chunkSize
}

// createMemfd makes a memfd that can be sealed. Kernels from 6.3 on want to hear
// that it is not for execution, and may insist; older ones do not know the flag.
func createMemfd() (int, error) {
	fd, err := unix.MemfdCreate("nbdctl", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("nbdctl", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	return fd, err
}

func (s *memfdStore) setUp(fd int) (err error) {
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return err
	}
	at := s.chunks * chunkSize
	if err := unix.Ftruncate(fd, at+s.overhead()); err != nil {
		return fmt.Errorf("ftruncate: %w", err)
	}
	// A file that another holder of it made shorter would kill who touches the
	// lost part of a mapping.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	for end := at + s.overhead(); at < end; at += allocateSize {
		if err := s.fallocate(0, at, min(allocateSize, end-at)); err != nil {
			return err
		}
	}
	bits, err := unix.Mmap(fd, s.chunks*chunkSize, int(s.overhead()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	s.bits = unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&bits[0])), len(bits)/8)
	s.maps = &mappings{windows: make([]atomic.Pointer[window], (s.size-1)/windowSize+1), bits: bits}
	return nil
}

// fallocate is fallocate(2), with every lack of memory as ENOSPC.
func (s *memfdStore) fallocate(mode uint32, off, n int64) error {
	var err error
	closed := s.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Fallocate(int(fd), mode, off, n)
		}
	})
	switch {
	case closed != nil:
		return fs.ErrClosed
	case err == unix.ENOMEM:
		err = unix.ENOSPC
	}
	if err != nil {
		return fmt.Errorf("fallocate: %w", err)
	}
	return nil
}

// run returns how many bytes from off on, at most n, are all content or all hole.
func (s *memfdStore) run(off, n int64) (length int64, used bool) {
	lo, hi := span(off, n)
	c, used := s.bits.run(lo, hi)
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
			} else if _, err := s.file.ReadAt(p[:n], off); err != nil {
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

// copyIn copies p to the device. Fresh memory is filled through the file, which
// spares a page fault for every page.
func (s *memfdStore) copyIn(p []byte, off int64, fresh bool) error {
	if fresh {
		_, err := s.file.WriteAt(p, off)
		return err
	}
	for len(p) > 0 {
		b, n := s.at(off, int64(len(p)))
		if b != nil {
			copy(b, p)
		} else if _, err := s.file.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	runtime.KeepAlive(s)
	return nil
}

func (s *memfdStore) writeFrom(r backends.Payload, off, n int64) error {
	lo, hi := span(off, n)
	if c, used := s.bits.run(lo, hi); !used || c < hi-lo {
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

// allocate makes room for the chunks from lo to hi that have no content, and
// returns how many bytes it took for them.
func (s *memfdStore) allocate(lo, hi int64) (taken int64, err error) {
	for c := lo; c < hi; {
		n, used := s.bits.run(c, min(hi, c+allocateSize/chunkSize))
		if !used {
			if err = s.budget.take(n * chunkSize); err == nil {
				taken += n * chunkSize
				err = s.fallocate(0, c*chunkSize, n*chunkSize)
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
	if d := taken - s.bits.set(lo, hi)*chunkSize; d != 0 {
		s.budget.give(d)
	}
}

func (s *memfdStore) trim(off, n int64) error {
	end := off + n
	// The chunks wholly inside; the device's last one may be short.
	lo, hi := (off+chunkSize-1)/chunkSize, end/chunkSize
	if end == s.size {
		hi = s.chunks
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
	cleared := s.bits.clear(lo, hi) * chunkSize
	if cleared == 0 {
		return nil
	}
	err := s.fallocate(punchHole, lo*chunkSize, (hi-lo)*chunkSize)
	if err != nil {
		s.mark(lo, hi, cleared) // which is always safe: content, or zeros
		return err
	}
	s.budget.give(cleared)
	return nil
}

// wipe makes zeros in place of content. Holes have them already.
func (s *memfdStore) wipe(off, n int64) error {
	for n > 0 {
		length, used := s.run(off, n)
		if used {
			b, l := s.at(off, min(length, allocateSize))
			if b == nil {
				if _, err := s.file.WriteAt(make([]byte, l), off); err != nil {
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
	return s.budget.inUse() - s.overhead()
}

// close drops the memory and closes the file. The mappings go with the store.
func (s *memfdStore) close() error {
	cleared := s.bits.clear(0, s.chunks)
	err := s.fallocate(punchHole, 0, s.chunks*chunkSize+s.overhead())
	s.budget.give(cleared * chunkSize)
	return errors.Join(err, s.file.Close())
}
