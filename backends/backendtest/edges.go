package backendtest

import (
	"bytes"
	"errors"
	"io"
	"math/bits"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// checkPromises looks at what the backend says of itself.
func checkPromises(s *subject) {
	for range 3 {
		if got := s.dev.Size(); got != s.size {
			s.Errorf("Size: %d, then %d", s.size, got)
		}
	}
	power := func(n int) bool { return n == 0 || n > 0 && bits.OnesCount(uint(n)) == 1 }
	b := s.dev.BlockSizes
	switch {
	case !power(b.Minimum) || !power(b.Preferred):
		s.Errorf("BlockSizes: %+v: minimum and preferred must be powers of two", b)
	case b.Preferred != 0 && b.Preferred < b.Minimum:
		s.Errorf("BlockSizes: %+v: preferred is below minimum", b)
	case b.Maximum < 0 || b.Maximum != 0 && b.Maximum < b.Minimum || int64(b.Maximum)%s.unit != 0:
		s.Errorf("BlockSizes: %+v: maximum must be a multiple of minimum", b)
	case s.size%s.unit != 0:
		s.Errorf("Size: %d is no multiple of the smallest request, %d", s.size, s.unit)
	}
	if again := backends.Probe(s.dev.Backend); again.Caps != s.dev.Caps || again.BlockSizes != b {
		s.Errorf("Probe: %v %+v, then %v %+v", s.dev.Caps, b, again.Caps, again.BlockSizes)
	}
	if s.dev.Syncer != nil {
		s.check(s.dev.Syncer.Sync(), "Sync with nothing to do", 0, 0)
	}
}

// checkReadEdges reads at the ends of the device and in different pieces.
func checkReadEdges(s *subject) {
	for _, off := range []int64{0, s.size} {
		if n, err := s.dev.ReadAt(nil, off); n != 0 || err != nil && !errors.Is(err, io.EOF) {
			s.Errorf("ReadAt of nothing at %d: %d bytes, %v", off, n, err)
		}
	}
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil {
			return
		}
		m.compare("read twice", m.base, min(s.unit, s.size))
		m.compare("read twice", m.end()-s.unit, s.unit)
		for range s.opts.Operations / 4 {
			off, n := s.random(s.rng, span[0], span[1], s.most)
			if !m.compare("read in other pieces", off, n) {
				return
			}
		}
	}
}

func checkConcurrentReads(s *subject) {
	span := s.spans()[0]
	m := newModel(s, span[0], span[1])
	if m == nil {
		return
	}
	var wg sync.WaitGroup
	for w := range workers {
		rng := s.worker(w)
		wg.Go(func() {
			for range s.opts.Operations / workers {
				off, n := s.random(rng, span[0], span[1], 16<<10)
				if !m.compare("concurrent reads", off, n) {
					return
				}
			}
		})
	}
	wg.Wait()
}

// checkWriteEdges writes at the ends of the device and around boundaries, and
// looks at the neighbours.
func checkWriteEdges(s *subject) {
	for _, off := range []int64{0, s.size} {
		if n, err := s.dev.WriterAt.WriteAt(nil, off); n != 0 || err != nil {
			s.Errorf("WriteAt of nothing at %d: %d bytes, %v", off, n, err)
		}
	}
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil {
			return
		}
		for _, boundary := range []int64{0, 512, 4096, 64 << 10, 1 << 20, span[1] - span[0]} {
			for _, from := range []int64{-2, -1, 0, 1} {
				for _, units := range []int64{1, 2, 3} {
					off := m.base + boundary/s.unit*s.unit + from*s.unit
					n := units * s.unit
					if off < m.base || off+n > m.end() || n > s.most {
						continue
					}
					if !m.write(off, fill(s.rng, n)) || !m.around("write beside a boundary", off, n) {
						return
					}
				}
			}
		}
		whole := min(s.most, m.end()-m.base)
		m.write(m.base, fill(s.rng, whole))
		m.write(m.end()-whole, bytes.Repeat([]byte{0}, int(whole)))
		m.compare("long writes", m.base, int64(len(m.data)))
	}
}

// checkRandom compares random requests of all kinds with the model.
func checkRandom(s *subject) {
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil {
			return
		}
		for i := range s.opts.Operations {
			if !m.step(s.rng, m.base, m.end()) {
				s.Logf("random request %d of %d", i+1, s.opts.Operations)
				return
			}
		}
		m.compare("after the random requests", m.base, int64(len(m.data)))
	}
}
