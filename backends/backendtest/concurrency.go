package backendtest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// workers is how many goroutines send requests at once.
const workers = 4

// worker returns the random numbers of one of them.
func (s *subject) worker(i int) *rand.Rand {
	return rand.New(rand.NewPCG(s.opts.Seed, uint64(1+i)))
}

// checkNeighbours has goroutines write side by side, into slots that share
// sectors, pages and chunks where the backend allows that. Nobody's bytes may
// suffer.
func checkNeighbours(s *subject) {
	span := s.spans()[0]
	slot := max(1000/s.unit, 1) * s.unit
	slots := min((span[1]-span[0])/slot, 512)
	m := newModel(s, span[0], span[0]+slots*slot)
	if m == nil {
		return
	}
	var wg sync.WaitGroup
	for w := range min(workers, slots) {
		rng := s.worker(int(w))
		wg.Go(func() {
			for range s.opts.Operations {
				i := w + workers*rng.Int64N((slots-w-1)/workers+1)
				lo := m.base + i*slot
				if !m.step(rng, lo, lo+slot) {
					return
				}
			}
		})
	}
	wg.Wait()
	m.compare("after concurrent requests to neighbours", m.base, int64(len(m.data)))
}

// checkOverlaps has goroutines write, zero, trim and read the same ranges. What
// is read must have been written at some time, and it settles when they are done.
func checkOverlaps(s *subject) {
	if raceEnabled {
		s.Skip("backends may copy without a lock, which the race detector reports")
	}
	span := s.spans()[0]
	span[1] = min(span[1], span[0]+512<<10/s.unit*s.unit+s.unit)
	m := newModel(s, span[0], span[1])
	if m == nil {
		return
	}
	// The outer quarters are not touched.
	quarter := int64(len(m.data)) / 4 / s.unit * s.unit
	lo, hi := m.base+quarter, m.end()-quarter
	for off := lo; off < hi; off += s.most {
		if !m.write(off, bytes.Repeat([]byte{workers + 1}, int(min(s.most, hi-off)))) {
			return
		}
	}
	var wg sync.WaitGroup
	for w := range workers {
		rng := s.worker(w)
		wg.Go(func() {
			for range s.opts.Operations {
				if !s.contend(rng, byte(1+w), lo, hi) {
					return
				}
			}
		})
	}
	wg.Wait()
	copy(m.at(lo, hi-lo), m.settled(lo, hi-lo))
	m.compare("after concurrent requests to the same ranges", m.base, int64(len(m.data)))
	m.cover()
	m.compare("written anew after concurrent requests", m.base, int64(len(m.data)))
}

// settled reads what the contention has left.
func (m *model) settled(off, n int64) (p []byte) {
	for end := off + n; off < end; off += m.most {
		p = append(p, m.read(off, min(m.most, end-off))...)
	}
	return p
}

// contend makes one request of the worker that writes the given byte.
func (s *subject) contend(rng *rand.Rand, c byte, lo, hi int64) bool {
	off, n := s.random(rng, lo, hi, s.most)
	switch op := rng.IntN(8); {
	case op == 0 && s.dev.Trimmer != nil:
		return s.check(s.dev.Trimmer.Trim(off, n), "Trim", off, n)
	case op == 1 && s.dev.Zeroer != nil:
		err := s.dev.Zeroer.Zero(off, n, backends.ZeroFlags(rng.IntN(int(zeroFlags))))
		return errors.Is(err, errors.ErrUnsupported) || s.check(err, "Zero", off, n)
	case op < 4:
		return s.write(off, bytes.Repeat([]byte{c}, int(n)))
	case op < 6 && s.dev.WriteFrom != nil:
		r := &payload{left: bytes.Repeat([]byte{c}, int(n))}
		err := s.dev.WriteFrom.WriteAtFrom(r, off, int(n))
		return err == backends.ErrWouldBlock || s.check(err, "WriteAtFrom", off, n)
	default:
		p := s.read(off, n)
		for i, got := range p {
			if got > workers+1 {
				s.Errorf("concurrent requests: byte %d is %#02x, which nobody wrote", off+int64(i), got)
				return false
			}
		}
		return p != nil
	}
}
