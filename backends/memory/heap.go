package memory

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/nbdctl/nbdctl/backends"
)

// A heapStore keeps chunks on the Go heap, for systems without memfd or with too
// few addresses to map one. A chunk that is not there is a hole; Trim drops
// chunks, and the garbage collector keeps those that a reply still refers to.
type heapStore struct {
	limit *limit
	table atomic.Pointer[table]

	mu sync.Mutex // held while a table or a region comes into being
}

type (
	table  []atomic.Pointer[region]
	chunk  [chunkSize]byte
	region [regionChunks]atomic.Pointer[chunk] // so that the table is sparse too
)

const (
	regionChunks = 1 << 14 // 1 GiB of device
	maxRegions   = 1 << 20 // 1 PiB; the table of regions itself is not sparse
)

func newHeapStore(size int64, l *limit) (store, error) {
	s := &heapStore{limit: l}
	s.table.Store(new(table))
	if err := s.grow(size); err != nil {
		return nil, err
	}
	return s, nil
}

// grow makes a longer table. Requests that still have the shorter one are inside
// of it, and find the same regions there.
func (s *heapStore) grow(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.table.Load()
	regions := (size-1)/(chunkSize*regionChunks) + 1
	if regions <= int64(len(old)) {
		return nil
	}
	if regions > maxRegions {
		return syscall.EFBIG
	}
	if err := s.limit.take((regions - int64(len(old))) * 8); err != nil {
		return err
	}
	long := make(table, regions)
	for i := range old {
		long[i].Store(old[i].Load())
	}
	s.table.Store(&long)
	return nil
}

// region returns the region with that number, which it makes if there is none.
func (s *heapStore) region(i int64) *region {
	if r := (*s.table.Load())[i].Load(); r != nil {
		return r
	}
	s.mu.Lock() // Into the table that grow has copied from, it would be lost.
	defer s.mu.Unlock()
	p := &(*s.table.Load())[i]
	if p.Load() == nil {
		p.Store(new(region))
	}
	return p.Load()
}

// piece returns the first part of [off, off+n), in one chunk; nil if that is a
// hole, which may be longer than a chunk.
func (s *heapStore) piece(off, n int64) (p []byte, length int64) {
	r := (*s.table.Load())[off/chunkSize/regionChunks].Load()
	if r == nil {
		const size = regionChunks * chunkSize
		return nil, min(n, size-off%size)
	}
	in := off % chunkSize
	length = min(n, chunkSize-in)
	c := r[off/chunkSize%regionChunks].Load()
	if c == nil {
		return nil, length
	}
	return c[in : in+length : in+length], length
}

// provide is piece where a hole is filled in first.
func (s *heapStore) provide(off, n int64) (p []byte, length int64, err error) {
	for {
		if p, length = s.piece(off, n); p != nil {
			return p, length, nil
		}
		if err := s.limit.take(chunkSize); err != nil {
			return nil, 0, err
		}
		r := s.region(off / chunkSize / regionChunks)
		if !r[off/chunkSize%regionChunks].CompareAndSwap(nil, new(chunk)) {
			s.limit.give(chunkSize) // another write to the chunk was first
		}
	}
}

func (s *heapStore) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		b, n := s.piece(off, int64(len(p)))
		if b == nil {
			clear(p[:n])
		} else {
			copy(p, b)
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (s *heapStore) readTo(w backends.Reply, off, n int64) error {
	for n > 0 {
		b, length := s.piece(off, n)
		if b == nil {
			w.Zeros(int(length))
		} else {
			w.Bytes(b)
		}
		off, n = off+length, n-length
	}
	return nil
}

func (s *heapStore) writeAt(p []byte, off int64) error {
	if err := s.allocate(off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		b, n, err := s.provide(off, int64(len(p))) // once more, should a trim be at work
		if err != nil {
			return err
		}
		copy(b, p)
		p, off = p[n:], off+n
	}
	return nil
}

// allocate lets a request fail before it has changed anything.
func (s *heapStore) allocate(off, n int64) error {
	for n > 0 {
		_, length, err := s.provide(off, n)
		if err != nil {
			return err
		}
		off, n = off+length, n-length
	}
	return nil
}

func (s *heapStore) writeFrom(r backends.Payload, off, n int64) error {
	// The chunks are collected before the first byte is taken: a trim meanwhile
	// must not turn them to holes with half of the payload gone.
	var few [16][]byte
	pieces := few[:0]
	for n > 0 {
		b, length := s.piece(off, n)
		if b == nil {
			return backends.ErrWouldBlock
		}
		pieces = append(pieces, b)
		off, n = off+length, n-length
	}
	for _, b := range pieces {
		if err := r.Into(b); err != nil {
			return err
		}
	}
	return nil
}

func (s *heapStore) trim(off, n int64, last bool) error {
	for n > 0 {
		b, length := s.piece(off, n)
		if b != nil && (len(b) == chunkSize || last && off%chunkSize == 0 && length == n) {
			if s.region(off / chunkSize / regionChunks)[off/chunkSize%regionChunks].Swap(nil) != nil {
				s.limit.give(chunkSize)
			}
		} else {
			clear(b)
		}
		off, n = off+length, n-length
	}
	return nil
}

func (s *heapStore) fill(off, n int64) error {
	if err := s.allocate(off, n); err != nil {
		return err
	}
	for n > 0 {
		b, length, err := s.provide(off, n)
		if err != nil {
			return err
		}
		clear(b)
		off, n = off+length, n-length
	}
	return nil
}

func (s *heapStore) run(off, n int64) (length int64, used bool) {
	b, length := s.piece(off, n)
	used = b != nil
	for length < n {
		b, l := s.piece(off+length, n-length)
		if (b != nil) != used {
			break
		}
		length += l
	}
	return length, used
}

func (s *heapStore) used() int64 {
	return s.limit.inUse() - int64(len(*s.table.Load()))*8
}

func (s *heapStore) close() error {
	return s.trim(0, int64(len(*s.table.Load()))*regionChunks*chunkSize, true)
}

// files has none: what is on the heap is this process's.
func (s *heapStore) files() ([]*os.File, error) { return nil, errors.ErrUnsupported }

func (s *heapStore) leave() error { return s.close() }
