package backendtest

import (
	"github.com/nbdctl/nbdctl/backends"
)

// checkDurability opens the device again and compares.
func checkDurability(s *subject) {
	if s.opts.Reopen == nil {
		s.Skip("no Options.Reopen")
	}
	span := s.spans()[len(s.spans())-1]
	m := newModel(s, span[0], span[1])
	if m == nil {
		return
	}
	for round := range 3 {
		for range 100 {
			if !m.step(s.rng, m.base, m.end()) {
				return
			}
		}
		if s.dev.Syncer != nil && !s.check(s.dev.Syncer.Sync(), "Sync", 0, 0) {
			return
		}
		after := "Sync"
		if s.dev.FUAWriter != nil && round > 0 {
			off, n := s.random(s.rng, m.base, m.end(), s.most)
			if !m.writeFUA(off, fill(s.rng, n)) {
				return
			}
			after = "Sync and WriteAtFUA"
		}
		s.dev = backends.Probe(s.opts.Reopen(s, s.dev.Backend))
		if got := s.dev.Size(); got != s.size {
			s.Errorf("opened again: Size %d, want %d", got, s.size)
			return
		}
		if !m.compare(after+", opened again", m.base, int64(len(m.data))) {
			return
		}
	}
}

// checkResize makes the device longer, shorter and as it was.
func checkResize(s *subject) {
	span := s.spans()[len(s.spans())-1]
	m := newModel(s, span[0], span[1])
	if m == nil || !m.cover() {
		return
	}
	more := max((64<<10)/s.unit, 1)*s.unit + s.unit
	for _, size := range []int64{s.size + more, s.size, s.size - s.unit, s.size, s.size + more} {
		if size <= m.base {
			continue
		}
		if err := s.dev.Resizer.Resize(size); err != nil {
			s.Errorf("Resize to %d: %v", size, err)
			return
		}
		if got := s.dev.Size(); got != size {
			s.Errorf("Resize to %d: Size is %d", size, got)
			return
		}
		for int64(len(m.data)) < size-m.base {
			m.data = append(m.data, 0)
		}
		m.data = m.data[:size-m.base]
		if !m.compare("Resize", m.base, size-m.base) || !m.write(m.end()-s.unit, fill(s.rng, s.unit)) {
			return
		}
	}
}
