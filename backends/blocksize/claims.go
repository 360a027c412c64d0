package blocksize

import (
	"context"
	"slices"
	"sync"
)

// claims keep changes of the same block apart of which one has to read it first. Whoever comes
// later waits for all that came before and are in its way, so nobody waits for ever.
type claims struct {
	mu      sync.Mutex
	all     []*claim  // in the order in which they came
	waiting int       // how many of them wait
	idle    sync.Pool // of *claim
}

// A claim is to the blocks in a range of bytes.
type claim struct {
	lo, hi int64
	whole  bool          // none of them has to be read
	waits  bool          // guarded by claims.mu
	turn   chan struct{} // has a value when it waits no longer
}

// blocks reports whether an earlier claim is in the way of a later one. What covers its blocks as a
// whole can be written at once, like any requests that overlap.
func (c *claim) blocks(later *claim) bool {
	return c.lo < later.hi && later.lo < c.hi && !(c.whole && later.whole)
}

// take waits until the range can be changed, or ctx ends.
func (s *claims) take(ctx context.Context, lo, hi int64, whole bool) (*claim, error) {
	c, ok := s.idle.Get().(*claim)
	if !ok {
		c = &claim{turn: make(chan struct{}, 1)}
	}
	c.lo, c.hi, c.whole = lo, hi, whole
	s.mu.Lock()
	c.waits = slices.ContainsFunc(s.all, func(earlier *claim) bool { return earlier.blocks(c) })
	waits := c.waits
	if waits {
		s.waiting++
	}
	s.all = append(s.all, c)
	s.mu.Unlock()
	if !waits {
		return c, nil
	}
	select {
	case <-c.turn:
		return c, nil
	case <-ctx.Done():
		s.drop(c)
		return nil, context.Cause(ctx)
	}
}

// drop ends a claim, and lets those go on that waited for it.
func (s *claims) drop(c *claim) {
	s.mu.Lock()
	i := slices.Index(s.all, c)
	s.all = slices.Delete(s.all, i, i+1)
	if c.waits {
		s.waiting--
	}
	for j := i; j < len(s.all) && s.waiting > 0; j++ {
		later := s.all[j]
		if later.waits && !slices.ContainsFunc(s.all[:j], func(e *claim) bool { return e.blocks(later) }) {
			later.waits = false
			s.waiting--
			later.turn <- struct{}{}
		}
	}
	s.mu.Unlock()
	select {
	case <-c.turn: // It came at the moment at which the wait was given up.
	default:
	}
	s.idle.Put(c)
}
