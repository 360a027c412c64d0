package memory_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/memory"
)

const chunk = 64 << 10

// stores are the constructors of all stores that this system can run.
var stores = map[string]func(int64, memory.Options) (*memory.Memory, error){
	"default": memory.New,
	"heap":    memory.NewOnHeap,
}

// forStores runs a test on all of them.
func forStores(t *testing.T, size int64, opts memory.Options, test func(*testing.T, *memory.Memory)) {
	for name, open := range stores {
		t.Run(name, func(t *testing.T) {
			m, err := open(size, opts)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := m.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
					t.Error(err)
				}
			})
			test(t, m)
		})
	}
}

func TestConformance(t *testing.T) {
	for name, open := range stores {
		for _, size := range []int64{1, 4096, 100_001, 3<<20 + 512, 1 << 40} {
			t.Run(fmt.Sprint(name, size), func(t *testing.T) {
				backendtest.Test(t, func(t testing.TB) backends.Backend {
					m, err := open(size, memory.Options{})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { m.Close() })
					return m
				}, backendtest.Options{TrimZeroes: true, Operations: 300})
			})
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, tt := range []struct {
		size  int64
		limit int64
		want  error
	}{
		{0, 0, fs.ErrInvalid},
		{-1, 0, fs.ErrInvalid},
		{1<<62 + 1, 0, fs.ErrInvalid},
		{1 << 20, -1, fs.ErrInvalid},
		{1 << 62, 1 << 30, syscall.ENOSPC}, // bookkeeping alone is more than that
		{1 << 62, 0, syscall.ENOSPC},
	} {
		m, err := memory.New(tt.size, memory.Options{Limit: tt.limit})
		if !errors.Is(err, tt.want) {
			t.Errorf("New(%d, limit %d): %v, want %v", tt.size, tt.limit, err, tt.want)
		}
		if m != nil {
			m.Close()
		}
	}
}

func TestNewOnHeapRefuses(t *testing.T) {
	if _, err := memory.NewOnHeap(1<<62, memory.Options{}); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("%v, want EFBIG", err)
	}
}

func TestUsed(t *testing.T) {
	forStores(t, 1<<40+1, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		used := func(after string, chunks int64) {
			t.Helper()
			if got := m.Used(); got != chunks*chunk {
				t.Errorf("%s: %d bytes used, want %d chunks", after, got, chunks)
			}
		}
		write := func(off, n int64) {
			t.Helper()
			if _, err := m.WriteAt(bytes.Repeat([]byte{1}, int(n)), off); err != nil {
				t.Fatal(err)
			}
		}
		used("new", 0)
		m.ReadAt(make([]byte, 10*chunk), 1<<39)
		used("after a read", 0)
		write(0, 1)
		write(10, 1)
		used("two bytes of one chunk", 1)
		write(chunk-1, 2)
		used("two bytes of two chunks", 2)
		write(1<<39+1, 4*chunk)
		used("four chunks, unaligned", 7)
		write(1<<40, 1)
		used("the last byte", 8)
		m.Trim(1, chunk-1)
		used("trim of a part", 8)
		m.Trim(0, chunk+1)
		used("trim of a chunk and a part", 7)
		m.Trim(1<<40-1, 2)
		used("trim of the last, short chunk", 6)
		m.Zero(1<<39, 3*chunk, 0)
		used("zeros of three chunks", 3)
		m.Zero(1<<39, 3*chunk, backends.ZeroNoHole)
		used("zeros without holes", 6)
		m.Trim(0, m.Size())
		used("trim of everything", 0)
		write(5, 1)
		m.Close()
		used("Close", 0)
	})
}

// A full device refuses what needs memory, and nothing else.
func TestFull(t *testing.T) {
	const limit = 10*chunk + chunk // the bookkeeping of a small device is one chunk
	forStores(t, 1<<30, memory.Options{Limit: limit}, func(t *testing.T, m *memory.Memory) {
		data := bytes.Repeat([]byte{7}, chunk)
		var n int64
		for ; n < 100; n++ {
			if _, err := m.WriteAt(data, 2*n*chunk); err != nil {
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatalf("full: %v, want ENOSPC", err)
				}
				break
			}
		}
		if n < 10 || m.Used() != n*chunk {
			t.Fatalf("%d chunks written, %d bytes used", n, m.Used())
		}

		if _, err := m.WriteAt([]byte{8}, 5); err != nil {
			t.Errorf("write to a chunk in use: %v", err)
		}
		if err := m.Zero(0, 20*chunk, backends.ZeroNoHole); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("zeros without holes: %v, want ENOSPC", err)
		}
		if err := m.Zero(2*chunk, chunk, backends.ZeroNoHole); err != nil {
			t.Errorf("zeros without holes on a chunk in use: %v", err)
		}
		if err := m.Trim(0, 5); err != nil {
			t.Errorf("trim of a part: %v", err)
		}
		got := make([]byte, chunk)
		if _, err := m.ReadAt(got, 4*chunk); err != nil || !bytes.Equal(got, data) {
			t.Errorf("content is not what it was (%v)", err)
		}

		if err := m.Trim(4*chunk, chunk); err != nil {
			t.Fatal(err)
		}
		if _, err := m.WriteAt([]byte{9}, 99*chunk); err != nil {
			t.Errorf("write in place of what was trimmed: %v", err)
		}
		if _, err := m.WriteAt([]byte{9}, 98*chunk); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("full again: %v, want ENOSPC", err)
		}
	})
}

// A write that does not fit changes nothing that was there.
func TestFullWriteIsAllOrNothing(t *testing.T) {
	forStores(t, 1<<30, memory.Options{Limit: 3 * chunk}, func(t *testing.T, m *memory.Memory) {
		if _, err := m.WriteAt(bytes.Repeat([]byte{1}, chunk), 0); err != nil {
			t.Fatal(err)
		}
		n, err := m.WriteAt(bytes.Repeat([]byte{2}, 40*chunk), 0)
		if n != 0 || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("%d, %v; want 0, ENOSPC", n, err)
		}
		got := make([]byte, 40*chunk)
		m.ReadAt(got, 0)
		want := append(bytes.Repeat([]byte{1}, chunk), make([]byte, 39*chunk)...)
		if !bytes.Equal(got, want) {
			t.Error("the refused write left something")
		}
	})
}

func TestOutside(t *testing.T) {
	forStores(t, 1000, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		for _, r := range [][2]int64{
			{-1, 1}, {-1 << 63, 1}, {1000, 1}, {999, 2}, {1 << 62, 1}, {0, 1001}, {1<<63 - 1, 10},
		} {
			off, n := r[0], r[1]
			if _, err := m.WriteAt(make([]byte, n), off); err == nil {
				t.Errorf("WriteAt %d+%d: no error", off, n)
			}
			if err := m.Trim(off, n); err == nil {
				t.Errorf("Trim %d+%d: no error", off, n)
			}
			if err := m.Zero(off, n, backends.ZeroNoHole); err == nil {
				t.Errorf("Zero %d+%d: no error", off, n)
			}
			if err := m.ReadAtTo(nil, off, int(n)); err == nil {
				t.Errorf("ReadAtTo %d+%d: no error", off, n)
			}
			if err := m.Extents(off, n, nil); err == nil {
				t.Errorf("Extents %d+%d: no error", off, n)
			}
		}
		if m.Trim(0, -1) == nil || m.Used() != 0 {
			t.Error("a negative length was taken")
		}

		// Reads follow io.ReaderAt.
		for _, tt := range []struct {
			off  int64
			n    int
			want int
			err  error
		}{
			{990, 10, 10, nil}, {990, 20, 10, io.EOF}, {1000, 1, 0, io.EOF}, {1 << 62, 1, 0, io.EOF}, {1000, 0, 0, nil},
		} {
			n, err := m.ReadAt(make([]byte, tt.n), tt.off)
			if n != tt.want || err != tt.err {
				t.Errorf("ReadAt of %d at %d: %d, %v; want %d, %v", tt.n, tt.off, n, err, tt.want, tt.err)
			}
		}
		if _, err := m.ReadAt(make([]byte, 1), -1); err == nil || err == io.EOF {
			t.Errorf("ReadAt before the start: %v", err)
		}
	})
}

func TestExtents(t *testing.T) {
	forStores(t, 1<<40, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		m.WriteAt([]byte{1}, 5*chunk+7)
		m.WriteAt(make([]byte, 2*chunk), 1<<39)
		var got []backends.Extent
		m.Extents(100, m.Size()-200, func(e backends.Extent) bool {
			got = append(got, e)
			return true
		})
		want := []backends.Extent{
			{Offset: 100, Length: 5*chunk - 100, Hole: true, Zero: true},
			{Offset: 5 * chunk, Length: chunk},
			{Offset: 6 * chunk, Length: 1<<39 - 6*chunk, Hole: true, Zero: true},
			{Offset: 1 << 39, Length: 2 * chunk},
			{Offset: 1<<39 + 2*chunk, Length: 1<<39 - 2*chunk - 100, Hole: true, Zero: true},
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("extents (-want +got):\n%s", d)
		}
	})
}

// collector is a reply that keeps references, as a server does.
type collector struct {
	backends.Reply
	pieces [][]byte
	zeros  int
}

func (c *collector) Bytes(p []byte) { c.pieces = append(c.pieces, p) }

func (c *collector) Zeros(n int) { c.zeros += n }

func TestClose(t *testing.T) {
	forStores(t, 1<<40, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		m.WriteAt([]byte("late"), 0)
		var late collector
		if err := m.ReadAtTo(&late, 0, 4); err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if got := late.pieces[0]; !bytes.Equal(got, []byte("late")) && !bytes.Equal(got, make([]byte, 4)) {
			t.Errorf("a reply still to be sent turned to %q", got)
		}
		p := make([]byte, 4)
		_, rerr := m.ReadAt(p, 0)
		_, werr := m.WriteAt(p, 0)
		for call, err := range map[string]error{
			"ReadAt": rerr, "WriteAt": werr,
			"ReadAtTo": m.ReadAtTo(&late, 0, 4), "WriteAtFrom": m.WriteAtFrom(nil, 0, 4),
			"Trim": m.Trim(0, 4), "Zero": m.Zero(0, 4, 0), "Extents": m.Extents(0, 4, nil), "Close": m.Close(),
		} {
			if !errors.Is(err, fs.ErrClosed) {
				t.Errorf("%s after Close: %v, want fs.ErrClosed", call, err)
			}
		}
	})
}

// source is a payload without end.
type source struct{ p []byte }

func (s source) Into(p []byte) error {
	copy(p, s.p)
	return nil
}

func TestFastPath(t *testing.T) {
	forStores(t, 1<<30, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		from := source{bytes.Repeat([]byte{3}, 2*chunk)}
		if err := m.WriteAtFrom(from, chunk, chunk); err != backends.ErrWouldBlock {
			t.Errorf("first write to a chunk: %v, want ErrWouldBlock", err)
		}
		m.WriteAt([]byte{1}, chunk)
		if err := m.WriteAtFrom(from, chunk, chunk); err != nil {
			t.Errorf("write to a chunk in use: %v", err)
		}
		if err := m.WriteAtFrom(from, chunk, chunk+1); err != backends.ErrWouldBlock {
			t.Errorf("write beyond it: %v, want ErrWouldBlock", err)
		}
		var got collector
		if err := m.ReadAtTo(&got, 0, 4*chunk); err != nil {
			t.Fatal(err)
		}
		if n := len(bytes.Join(got.pieces, nil)); n != chunk || got.zeros != 3*chunk {
			t.Errorf("%d bytes by reference and %d zeros, want one chunk and three", n, got.zeros)
		}
	})
}

func TestNoAllocations(t *testing.T) {
	forStores(t, 1<<30, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		p := make([]byte, 4096)
		m.WriteAt(p, 0)
		var w backends.Reply = discard{}
		var r backends.Payload = source{p}
		for name, call := range map[string]func(){
			"ReadAt":      func() { m.ReadAt(p, 0) },
			"ReadAt hole": func() { m.ReadAt(p, 10*chunk) },
			"WriteAt":     func() { m.WriteAt(p, 0) },
			"ReadAtTo":    func() { m.ReadAtTo(w, 0, 4096) },
			"WriteAtFrom": func() { m.WriteAtFrom(r, 0, 4096) },
			"Trim":        func() { m.Trim(0, 4096) },
		} {
			if n := testing.AllocsPerRun(100, call); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
	})
}

type discard struct{ backends.Reply }

func (discard) Bytes([]byte) {}

func (discard) Zeros(int) {}
