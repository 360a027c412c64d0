package backendtest

import (
	"github.com/nbdctl/nbdctl/backends"
)

// ranges are what Zero and Trim are tried on: inside a page or a chunk, across
// their boundaries, and all of the span.
func (m *model) ranges() [][2]int64 {
	var rs [][2]int64
	for _, r := range [][2]int64{
		{0, 1}, {5, 100}, {4096, 4096}, {4095, 2}, {1000, 10000},
		{64 << 10, 64 << 10}, {64<<10 - 1, 2}, {60000, 200000}, {128<<10 + 1, 64<<10 - 1},
	} {
		off, n := r[0]/m.unit*m.unit, max(r[1]/m.unit, 1)*m.unit
		if off+n <= int64(len(m.data)) {
			rs = append(rs, [2]int64{m.base + off, n}, [2]int64{m.end() - off - n, n})
		}
	}
	return append(rs, [2]int64{m.base, int64(len(m.data))})
}

// cover writes to the whole model, so that everything lost shows.
func (m *model) cover() bool {
	for off := m.base; off < m.end(); off += m.most {
		if !m.write(off, fill(m.rng, min(m.most, m.end()-off))) {
			return false
		}
	}
	return true
}

// zeroFlags is how many combinations of flags Zero has.
const zeroFlags = backends.ZeroFast << 1

func checkZero(s *subject) {
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil || !m.cover() {
			return
		}
		for flags := range zeroFlags {
			for _, r := range m.ranges() {
				off, n := r[0], r[1]
				if !m.zero(off, n, flags) || !m.around("Zero", off, n) {
					return
				}
				// And back to content, above what may be a hole now.
				if n <= s.most && (!m.write(off, fill(s.rng, n)) || !m.around("write after Zero", off, n)) {
					return
				}
			}
			if !m.compare("after Zero", m.base, int64(len(m.data))) || !m.cover() {
				return
			}
		}
	}
}

// checkCache has ranges fetched, written ones among them, which changes nothing.
func checkCache(s *subject) {
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil || s.dev.WriterAt != nil && !m.cover() {
			return
		}
		for _, r := range m.ranges() {
			if !m.cache(r[0], r[1]) || !m.around("Cache", r[0], r[1]) {
				return
			}
		}
		m.compare("after Cache", m.base, int64(len(m.data)))
	}
	s.check(s.dev.Cacher.Cache(0, s.size), "Cache", 0, s.size)
	s.check(s.dev.Cacher.Cache(s.size, 0), "Cache", s.size, 0)
}

func checkTrim(s *subject) {
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil || !m.cover() {
			return
		}
		for _, r := range m.ranges() {
			off, n := r[0], r[1]
			if !m.trim(off, n) || !m.around("Trim", off, n) {
				return
			}
			if n <= s.most && (!m.write(off, fill(s.rng, n)) || !m.around("write after Trim", off, n)) {
				return
			}
		}
		m.compare("after Trim", m.base, int64(len(m.data)))
	}
}

// checkExtents asks for many ranges, on a device with holes where it can have
// them.
func checkExtents(s *subject) {
	for _, span := range s.spans() {
		m := newModel(s, span[0], span[1])
		if m == nil {
			return
		}
		if s.dev.Zeroer != nil {
			if !m.cover() {
				return
			}
			for range 10 {
				off, n := s.random(s.rng, span[0], span[1], 1<<20)
				if !m.zero(off, n, 0) {
					return
				}
			}
		}
		if !m.extents(m.base, int64(len(m.data))) || !m.extents(m.base, s.unit) || !m.extents(m.end()-s.unit, s.unit) {
			return
		}
		for range s.opts.Operations / 10 {
			off, n := s.random(s.rng, span[0], span[1], span[1]-span[0])
			if !m.extents(off, n) {
				return
			}
		}
		m.stopsEarly()
	}
}

// extents checks the answer for one range.
func (m *model) extents(off, n int64) bool {
	at, ok := off, true
	err := m.dev.Extenter.Extents(off, n, func(e backends.Extent) bool {
		switch {
		case e.Offset != at || e.Length < 1 || e.Length > off+n-at:
			m.Errorf("Extents of %d bytes at %d: %+v where %d is next", n, off, e, at)
			ok = false
		case e.Zero:
			ok = m.equal("Extents says zeros", e.Offset, m.at(e.Offset, e.Length), make([]byte, e.Length))
		}
		at = e.Offset + e.Length
		return ok
	})
	if !m.check(err, "Extents", off, n) || !ok {
		return false
	}
	if at != off+n {
		m.Errorf("Extents of %d bytes at %d ends at %d", n, off, at)
	}
	return at == off+n
}

// stopsEarly checks that Extents takes no for an answer.
func (m *model) stopsEarly() {
	calls := 0
	err := m.dev.Extenter.Extents(m.base, int64(len(m.data)), func(backends.Extent) bool {
		calls++
		return false
	})
	if err != nil || calls != 1 {
		m.Errorf("Extents, stopped at the first: %d calls, %v", calls, err)
	}
}
