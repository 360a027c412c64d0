//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// windowSize is how much of the device is mapped at a time, when it is first
	// needed. One mapping of it all would fail where addresses are few (512 GiB
	// in User-Mode Linux, any number under ulimit -v).
	windowSize = 4 << 30

	// spareAddresses must be left for the Go heap and everybody else after a
	// window was mapped: the runtime does not survive an mmap that fails.
	spareAddresses = 64 << 30
)

// windowChunks is the same in chunks.
const windowChunks = windowSize / chunkSize

// mappings are what has to be unmapped at the end.
type mappings struct {
	mu  sync.Mutex // guards all, and is held while a window or an extent comes into being
	all [][]byte
}

// add maps a part of f for as long as the store lives.
func (m *mappings) add(f *memfd, off, n int64) ([]byte, error) {
	p, err := f.mmap(off, n)
	if err == nil {
		m.all = append(m.all, p)
	}
	return p, err
}

func (m *mappings) unmap() {
	for _, p := range m.all {
		unix.Munmap(p)
	}
}

// A window is a mapped part of the device. No bytes: there were no addresses left,
// and the part is read and written through the file instead.
type window struct{ bytes []byte }

// at returns the mapped bytes from off on, at most n and not beyond a window, or
// nil where there are no addresses to map them at.
func (s *memfdStore) at(off, n int64) (p []byte, length int64) {
	in := off % windowSize
	length = min(n, windowSize-in)
	w := s.extent.Load().windows[off/windowSize].Load()
	if w == nil {
		w = s.open(off / windowSize)
	}
	if w.bytes == nil {
		return nil, length
	}
	return w.bytes[in : in+length : in+length], length
}

// open maps a window: all of it, for a device that ends in it may grow.
func (s *memfdStore) open(i int64) *window {
	s.maps.mu.Lock()
	defer s.maps.mu.Unlock()
	place := &s.extent.Load().windows[i]
	if w := place.Load(); w != nil {
		return w
	}
	w := new(window)
	const reserved = unix.MAP_PRIVATE | unix.MAP_ANON | unix.MAP_NORESERVE
	if spare, err := unix.Mmap(-1, 0, spareAddresses, unix.PROT_NONE, reserved); err == nil {
		if p, err := s.maps.add(s.data, i*windowSize, windowSize); err == nil {
			unix.Madvise(p, unix.MADV_DONTDUMP) // a disk in a core file helps nobody
			w.bytes = p
		}
		unix.Munmap(spare)
	}
	place.Store(w)
	return w
}
