package nbd_test

import (
	"context"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
)

// BenchmarkRead measures reads of a server at NBD_TEST_URI, or else of one in this process.
func BenchmarkRead(b *testing.B) {
	for _, tt := range []struct {
		name  string
		size  int
		depth int
	}{
		{"4k-q1", 4 << 10, 1},
		{"4k-q32", 4 << 10, 32},
		{"128k-q16", 128 << 10, 16},
		{"1M-q4", 1 << 20, 4},
	} {
		b.Run(tt.name, func(b *testing.B) {
			u := benchmarked(b)
			c := dial(b, u, nbd.Options{})
			blocks := c.Size() / int64(tt.size)
			b.SetBytes(int64(tt.size))
			b.ReportAllocs()
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var all sync.WaitGroup
			for range tt.depth {
				all.Go(func() {
					p := make([]byte, tt.size)
					for left.Add(-1) >= 0 {
						if _, err := c.ReadAt(p, rand.Int64N(blocks)*int64(tt.size)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
		})
	}
}

func benchmarked(b *testing.B) nbd.URI {
	text := os.Getenv("NBD_TEST_URI")
	if text == "" {
		return serve(b, newMemory(b, 64<<20), new(server.Server))
	}
	u, err := nbd.ParseURI(text)
	if err != nil {
		b.Fatal(err)
	}
	h, err := u.Negotiate(context.Background(), nbd.Options{})
	if err != nil {
		b.Fatal(err)
	}
	h.Close()
	return u
}
