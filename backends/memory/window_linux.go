//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"sync"
	"sync/atomic"

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

// mappings are what has to be unmapped at the end.
type mappings struct {
	mu      sync.Mutex // guards the making of windows
	windows []atomic.Pointer[window]
	bits    []byte
}

// A window is a mapped part of the device. No bytes: there were no addresses left,
// and the part is read and written through the file instead.
type window struct{ bytes []byte }

// at returns the mapped bytes from off on, at most n and not beyond a window, or
// nil where there are no addresses to map them at.
func (s *memfdStore) at(off, n int64) (p []byte, length int64) {
	in := off % windowSize
	length = min(n, windowSize-in)
	w := s.maps.windows[off/windowSize].Load()
	if w == nil {
		w = s.open(off / windowSize)
	}
	if w.bytes == nil {
		return nil, length
	}
	return w.bytes[in : in+length : in+length], length
}

// open maps a window.
func (s *memfdStore) open(i int64) *window {
	s.maps.mu.Lock()
	defer s.maps.mu.Unlock()
	if w := s.maps.windows[i].Load(); w != nil {
		return w
	}
	w := new(window)
	s.raw.Control(func(fd uintptr) {
		spare, err := unix.Mmap(-1, 0, spareAddresses, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
		if err != nil {
			return
		}
		n := min(windowSize, s.chunks*chunkSize-i*windowSize)
		if p, err := unix.Mmap(int(fd), i*windowSize, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			unix.Madvise(p, unix.MADV_DONTDUMP) // a disk in a core file helps nobody
			w.bytes = p
		}
		unix.Munmap(spare)
	})
	s.maps.windows[i].Store(w)
	return w
}

func (m *mappings) unmap() {
	unix.Munmap(m.bits)
	for i := range m.windows {
		if w := m.windows[i].Load(); w != nil && w.bytes != nil {
			unix.Munmap(w.bytes)
		}
	}
}
