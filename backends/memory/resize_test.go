package memory_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/memory"
)

// A device that shrinks gives its memory back, and one that grows again has zeros
// where it was cut, however far that is.
func TestResize(t *testing.T) {
	forStores(t, 10*chunk+100, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		data := bytes.Repeat([]byte{7}, 10*chunk+100)
		if _, err := m.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		var late collector
		if err := m.ReadAtTo(&late, 9*chunk, chunk); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct{ size, chunks, content int64 }{
			{10*chunk + 100, 11, 10*chunk + 100},
			{3*chunk + 10, 4, 3*chunk + 10},
			{1 << 41, 4, 3*chunk + 10},
			{3 * chunk, 3, 3 * chunk},
			{3*chunk + 1, 3, 3 * chunk},
			{1, 1, 1},
			{11 * chunk, 1, 1},
		} {
			if err := m.Resize(tt.size); err != nil || m.Size() != tt.size {
				t.Fatalf("resize to %d: size %d, %v", tt.size, m.Size(), err)
			}
			if m.Used() != tt.chunks*chunk {
				t.Errorf("%d bytes: %d bytes used, want %d chunks", tt.size, m.Used(), tt.chunks)
			}
			got := make([]byte, min(tt.size, 11*chunk))
			if _, err := m.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			want := append(bytes.Clone(data[:tt.content]), make([]byte, int64(len(got))-tt.content)...)
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes: content is wrong", tt.size)
			}
			if _, err := m.WriteAt([]byte{1}, tt.size); err == nil {
				t.Errorf("%d bytes: a write behind the end was taken", tt.size)
			}
		}
		// The whole of a new end can be used, once and again.
		for _, size := range []int64{1 << 33, 1 << 37, 1 << 41} {
			if err := m.Resize(size); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{0, size/2 - 2, size - 4} {
				for range 2 {
					if _, err := m.WriteAt([]byte("here"), off); err != nil {
						t.Fatal(err)
					}
				}
				got := make([]byte, 4)
				if _, err := m.ReadAt(got, off); err != nil || string(got) != "here" {
					t.Errorf("%d bytes: %q at %d, %v", size, got, off, err)
				}
			}
		}
		if p := late.pieces[0][0]; p != 7 && p != 0 {
			t.Errorf("a reply still to be sent turned to %#x", p)
		}
	})
}

func TestResizeRefuses(t *testing.T) {
	forStores(t, chunk, memory.Options{Limit: 3 * chunk}, func(t *testing.T, m *memory.Memory) {
		m.WriteAt([]byte{7}, 0)
		for _, tt := range []struct {
			size int64
			want error
		}{{0, fs.ErrInvalid}, {-1, fs.ErrInvalid}, {1<<62 + 1, fs.ErrInvalid}, {1 << 49, syscall.ENOSPC}} {
			if err := m.Resize(tt.size); !errors.Is(err, tt.want) || m.Size() != chunk {
				t.Errorf("resize to %d: size %d, %v, want %v", tt.size, m.Size(), err, tt.want)
			}
		}
		if _, err := m.WriteAt([]byte{7}, 0); err != nil || m.Used() != chunk {
			t.Errorf("afterwards: %d bytes used, %v", m.Used(), err)
		}
		m.Close()
		if err := m.Resize(2 * chunk); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// Requests below both sizes go on while the end moves, and trims up to a former
// end do not take what is written behind it.
func TestResizeUnderRequests(t *testing.T) {
	const small, large = 5*chunk + 512, 9*chunk + 1024
	forStores(t, small, memory.Options{}, func(t *testing.T, m *memory.Memory) {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for w := range int64(3) {
			rng := rand.New(rand.NewPCG(7, uint64(w)))
			wg.Go(func() {
				p, got := make([]byte, 3000), make([]byte, 3000)
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					off := w*chunk + rng.Int64N(chunk-int64(len(p)))
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					_, werr := m.WriteAt(p, off)
					_, rerr := m.ReadAt(got, off)
					if werr != nil || rerr != nil || !bytes.Equal(got, p) {
						t.Errorf("at %d: other content than was written (%v, %v)", off, werr, rerr)
						return
					}
				}
			})
		}
		for i := range 1000 {
			trimmed := make(chan error, 1)
			go func() { trimmed <- m.Trim(4*chunk, small-4*chunk) }()
			if err := m.Resize(large); err != nil {
				t.Fatal(err)
			}
			want := []byte{byte(i), 1, 2, 3}
			if _, err := m.WriteAt(want, small); err != nil {
				t.Fatal(err)
			}
			if err := <-trimmed; err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4)
			if _, err := m.ReadAt(got, small); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("round %d: %v behind the former end, want %v (%v)", i, got, want, err)
			}
			if err := m.Resize(small); err != nil {
				t.Fatal(err)
			}
		}
		close(stop)
		wg.Wait()
	})
}
