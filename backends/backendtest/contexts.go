package backendtest

import (
	"math"

	"github.com/nbdctl/nbdctl/backends"
)

// checkContexts asks for many ranges in each context.
func checkContexts(s *subject) {
	contexts := s.dev.Contexter.Contexts()
	if len(contexts) == 0 || len(contexts) > backends.MaxContexts {
		s.Errorf("Contexts: %d, of 1 to %d", len(contexts), backends.MaxContexts)
	}
	for _, c := range contexts {
		for _, span := range s.spans() {
			whole := span[1] - span[0]
			ok := s.marks(c, span[0], whole) && s.marks(c, span[0], s.unit) && s.marks(c, span[1]-s.unit, s.unit)
			for range s.opts.Operations / 10 {
				if !ok {
					return
				}
				off, n := s.random(s.rng, span[0], span[1], whole)
				ok = s.marks(c, off, n)
			}
		}
		calls := 0
		err := s.dev.Contexter.ContextExtents(c.Name, 0, s.size, func(backends.Mark) bool {
			calls++
			return false
		})
		if err != nil || calls != 1 {
			s.Errorf("ContextExtents of %s, stopped at the first: %d calls, %v", c.Name, calls, err)
		}
	}
}

// marks checks the answer for one range.
func (s *subject) marks(c backends.Context, off, n int64) bool {
	at, ok := off, true
	err := s.dev.Contexter.ContextExtents(c.Name, off, n, func(m backends.Mark) bool {
		switch {
		case m.Offset != at || m.Length < 1 || m.Length > off+n-at || (m.Offset|m.Length)%s.unit != 0:
			s.Errorf("ContextExtents of %s, %d bytes at %d: %+v where %d is next", c.Name, n, off, m, at)
			ok = false
		case !c.Wide && m.Flags > math.MaxUint32:
			s.Errorf("ContextExtents of %s: flags %#x, and it is not Wide", c.Name, m.Flags)
			ok = false
		}
		at = m.Offset + m.Length
		return ok
	})
	if !s.check(err, "ContextExtents", off, n) || !ok {
		return false
	}
	if at != off+n {
		s.Errorf("ContextExtents of %s, %d bytes at %d, ends at %d", c.Name, n, off, at)
	}
	return at == off+n
}
