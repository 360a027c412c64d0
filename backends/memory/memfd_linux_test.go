//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
)

func newMemfd(t testing.TB, size int64) (*Memory, *memfdStore) {
	t.Helper()
	s, err := newMemfdStore(size, newLimit(0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.data.close(); s.bits.close() })
	return newMemory(size, s), s
}

// unmapped leaves the store without addresses for its windows.
func unmapped(s *memfdStore) {
	for i := range s.extent.Load().windows {
		s.extent.Load().windows[i].Store(&window{})
	}
}

func TestConformanceUnmapped(t *testing.T) {
	backendtest.Test(t, func(t testing.TB) backends.Backend {
		m, s := newMemfd(t, 1<<40)
		unmapped(s)
		return m
	}, backendtest.Options{TrimZeroes: true, Operations: 300})
}

// Where one window is mapped and the next is not, requests across the border are
// still whole.
func TestHalfMapped(t *testing.T) {
	m, s := newMemfd(t, 2*windowSize)
	s.extent.Load().windows[1].Store(&window{})
	data := bytes.Repeat([]byte("border"), 1<<16)
	off := int64(windowSize - len(data)/2)
	for range 2 { // the second time it is not fresh
		if _, err := m.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data))
		if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("content is wrong (%v)", err)
		}
		data = bytes.Repeat([]byte("BORDER"), 1<<16)
	}
	var asked payload
	if err := m.WriteAtFrom(&asked, off, len(data)); err != backends.ErrWouldBlock || asked {
		t.Errorf("WriteAtFrom: %v, took bytes: %v", err, asked)
	}
}

type payload bool

func (p *payload) Into([]byte) error { *p = true; return nil }

// occupied is what the kernel says of the file.
func occupied(t *testing.T, s *memfdStore) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(s.data.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// Used is what the kernel says, and reading takes no memory.
func TestUsedIsTrue(t *testing.T) {
	m, s := newMemfd(t, 1<<40)
	check := func(after string) {
		t.Helper()
		if used, occupied := m.Used(), occupied(t, s); used != occupied {
			t.Errorf("%s: %d bytes used, the file occupies %d", after, used, occupied)
		}
	}
	check("new")
	rng := rand.New(rand.NewPCG(3, 4))
	buf := make([]byte, 200<<10)
	for range 100 {
		p := buf[:1+rng.IntN(len(buf))]
		m.ReadAt(p, rng.Int64N(1<<40-int64(len(p))))
	}
	check("reads of holes")
	for range 50 {
		p := buf[:1+rng.IntN(len(buf))]
		off := rng.Int64N(16 << 20)
		if _, err := m.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		check("write")
		m.Trim(rng.Int64N(16<<20), rng.Int64N(2<<20))
		check("trim")
		m.ReadAt(buf, rng.Int64N(16<<20))
		check("read")
	}
	m.Trim(0, m.Size())
	check("trim of everything")
	if m.Used() != 0 {
		t.Errorf("%d bytes used in the end", m.Used())
	}
}

// Requests that overlap leave the bits, the content and the limit in step.
func TestOverlapsKeepInvariant(t *testing.T) {
	const size = 8 * chunkSize
	m, s := newMemfd(t, size)
	var wg sync.WaitGroup
	for w := range 4 {
		rng := rand.New(rand.NewPCG(5, uint64(w)))
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(w + 1)}, size)
			for range 3000 {
				off := rng.Int64N(size)
				n := 1 + rng.Int64N(size-off)
				switch rng.IntN(5) {
				case 0:
					m.Trim(off, n)
				case 1:
					m.Trim(off/chunkSize*chunkSize, chunkSize)
				case 2:
					m.Zero(off, n, backends.ZeroNoHole)
				default:
					m.WriteAt(p[:n], off)
				}
			}
		})
	}
	wg.Wait()
	var used int64
	raw := make([]byte, chunkSize)
	for c := range int64(size / chunkSize) {
		if _, err := s.data.ReadAt(raw, c*chunkSize); err != nil {
			t.Fatal(err)
		}
		if _, set := s.extent.Load().bits.run(c, c+1); set {
			used += chunkSize
		} else if !bytes.Equal(raw, make([]byte, chunkSize)) {
			t.Errorf("chunk %d is not zeros and its bit is clear", c)
		}
	}
	if m.Used() != used {
		t.Errorf("%d bytes used, the bits say %d", m.Used(), used)
	}
}

// Close comes too early here, which costs errors, not the process.
func TestCloseUnderRequests(t *testing.T) {
	m, _ := newMemfd(t, 64*chunkSize)
	p := make([]byte, 3*chunkSize)
	m.WriteAt(p, 0)
	started := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for w := range 4 {
		rng := rand.New(rand.NewPCG(6, uint64(w)))
		wg.Go(func() {
			p := make([]byte, 3*chunkSize)
			for i := range 100_000 {
				if i == 100 {
					started <- struct{}{}
				}
				off := rng.Int64N(60 * chunkSize)
				if _, err := m.WriteAt(p, off); err != nil {
					return
				}
				if _, err := m.ReadAt(p, off); err != nil {
					return
				}
				if m.Trim(off, int64(len(p))) != nil {
					return
				}
			}
		})
	}
	for range 4 {
		<-started
	}
	m.Close()
	wg.Wait()
}

// mapped counts the mappings of a store's files in this process.
func mapped(t *testing.T, inodes [2]string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), " "+inodes[0]+" ") + strings.Count(string(b), " "+inodes[1]+" ")
}

// Mappings stay for late readers and go with the store.
func TestUnmap(t *testing.T) {
	m, err := New(1<<40, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var inodes [2]string
	for i, f := range []*memfd{m.store.(*memfdStore).data, m.store.(*memfdStore).bits} {
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		inodes[i] = fmt.Sprint(st.Sys().(*syscall.Stat_t).Ino)
	}
	for off := int64(0); off < 1<<40; off += 1 << 36 {
		// The first write goes through the file, the second through a mapping.
		m.WriteAt([]byte{1}, off)
		m.WriteAt([]byte{1}, off)
	}
	if got := mapped(t, inodes); got != 17 {
		t.Errorf("%d mappings, want 16 windows and the bits", got)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if got := mapped(t, inodes); got != 17 {
		t.Errorf("%d mappings after Close, while there may be late readers", got)
	}
	runtime.KeepAlive(m)
	m = nil
	for deadline := time.Now().Add(10 * time.Second); mapped(t, inodes) > 0; runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatalf("%d mappings are left", mapped(t, inodes))
		}
	}
}

// Nobody who is handed the file can pull it away from under the mappings.
func TestSealed(t *testing.T) {
	_, s := newMemfd(t, chunkSize)
	if err := s.data.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate: %v, want EPERM", err)
	}
}
