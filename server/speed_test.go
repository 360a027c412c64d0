package server_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A paced backend takes its time for what is not at warm's offset: for each call, or for one after
// the other.
type paced struct {
	*disk
	takes time.Duration
	lock  chan struct{} // nil: calls do not wait for each other

	calls, together int // at the moment, and at most since that was set to 0; guarded by mu
}

func newPaced(takes time.Duration, lock chan struct{}) *paced {
	p := &paced{disk: newDisk(1 << 20), takes: takes, lock: lock}
	p.before = func(op string, off, n int64) error {
		if off == 4096 {
			return nil
		}
		p.enter(1)
		defer p.enter(-1)
		if p.lock != nil {
			p.lock <- struct{}{}
			defer func() { <-p.lock }()
		}
		time.Sleep(p.takes)
		return nil
	}
	return p
}

func (p *paced) enter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls += n
	p.together = max(p.together, p.calls)
}

// atOnce returns how many calls were under way together since it was asked last.
func (p *paced) atOnce() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.together
	p.together = p.calls
	return n
}

const depth = 32

// rounds makes bursts of writes, and a quick read beside each. It returns how long a burst took,
// and the longest that a read did.
func rounds(s *session, n int) (burst, read time.Duration) {
	start := time.Now()
	for range n {
		var writes []<-chan reply
		for range depth {
			writes = append(writes, s.start(call{op: cmdWrite, data: make([]byte, 512)}))
		}
		began := time.Now()
		s.expect(0, call{op: cmdRead, offset: 4096, length: 512})
		read = max(read, time.Since(began))
		for _, ch := range writes {
			<-ch
		}
	}
	return time.Since(start) / time.Duration(n), read
}

// TestLockedBackend has writes that are quick, but wait for each other, as those to a file do: on
// workers they look slow, and must leave them in spite of that.
func TestLockedBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newPaced(10*time.Microsecond, make(chan struct{}, 1))
		s := connect(t, export(t, b, server.Options{}))
		rounds(s, 10)
		b.atOnce()
		rounds(s, 10)
		if n := b.atOnce(); n != 1 {
			t.Errorf("%d calls at once after 10 rounds", n)
		}
		s.disconnect()
	})
}

// TestSlowBackend holds how much a backend that is slow in each call loses by the trials, and what
// waits beside it.
func TestSlowBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const takes = 200 * time.Microsecond
		b := newPaced(takes, nil)
		s := connect(t, export(t, b, server.Options{}))
		rounds(s, 100)
		burst, read := rounds(s, 1000)
		if burst > takes*11/10 {
			t.Errorf("a burst of writes of %v took %v on average", takes, burst)
		}
		if read > 10*takes {
			t.Errorf("a read beside them took %v", read)
		}
		s.disconnect()
	})
}

// TestChangesSpeed follows a backend that is quick, slow, and quick again.
func TestChangesSpeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newPaced(time.Microsecond, nil)
		s := connect(t, export(t, b, server.Options{}))
		rounds(s, 10)
		b.atOnce()
		for range 3 {
			rounds(s, 10)
			if n := b.atOnce(); n != 1 {
				t.Errorf("quick: %d calls at once", n)
			}
			b.takes = 5 * time.Millisecond
			rounds(s, 10)
			b.atOnce()
			if burst, read := rounds(s, 10); burst != b.takes || read != 0 || b.atOnce() != depth {
				t.Errorf("slow: a burst took %v and a read beside it %v", burst, read)
			}
			b.takes = time.Microsecond
			time.Sleep(10 * time.Second)
			rounds(s, 10)
			b.atOnce()
		}
		s.disconnect()
	})
}
