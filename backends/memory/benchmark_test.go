package memory_test

import (
	"bytes"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
)

func Benchmark4k(b *testing.B) {
	for name, open := range stores {
		m, err := open(1<<30, memory.Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer m.Close()
		const span = 64 << 20
		if _, err := m.WriteAt(bytes.Repeat([]byte{1}, span), 0); err != nil {
			b.Fatal(err)
		}
		p := make([]byte, 4096)
		var w backends.Reply = discard{}
		for op, call := range map[string]func(off int64){
			"ReadAt":      func(off int64) { m.ReadAt(p, off) },
			"ReadAtHole":  func(off int64) { m.ReadAt(p, off+span) },
			"ReadAtTo":    func(off int64) { m.ReadAtTo(w, off, len(p)) },
			"WriteAt":     func(off int64) { m.WriteAt(p, off) },
			"WriteAtFrom": func(off int64) { m.WriteAtFrom(source{p}, off, len(p)) },
		} {
			b.Run(name+"/"+op, func(b *testing.B) {
				b.SetBytes(4096)
				b.ReportAllocs()
				for i := range b.N {
					call(int64(i) * 4096 % span)
				}
			})
		}
	}
}

// BenchmarkFirstWrite includes giving the memory back.
func BenchmarkFirstWrite(b *testing.B) {
	for name, open := range stores {
		b.Run(name, func(b *testing.B) {
			m, err := open(1<<40, memory.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			p := make([]byte, chunk)
			b.SetBytes(chunk)
			b.ReportAllocs()
			for i := range b.N {
				off := int64(i) % 512 * chunk
				if _, err := m.WriteAt(p, off); err != nil {
					b.Fatal(err)
				}
				if off == 511*chunk {
					m.Trim(0, 512*chunk)
				}
			}
		})
	}
}
