package pace

import (
	"runtime"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/monotonic"
)

// A Meter times the plain calls that a connection's goroutine makes. Without a Set it is not
// usable; the rest may be zero. Used by one goroutine.
type Meter struct {
	Set *Set
	// Switches counts how often the calling thread has slept, and how often it was preempted. nil
	// where nothing tells.
	Switches func() (slept, preempted int64)

	start        time.Duration // of the calls that are being timed together
	calls, bytes int
	of           [3]bool // whose they are
	crowded      bool    // workers were making such calls meanwhile

	watch            int // how many calls are still timed one by one
	slow             [3]slowness
	slept, preempted int64 // before the call
	excused          bool  // the call before, for having been preempted

	trials [3]int64 // of the Set, as far as the Meter knows
}

// slowness is what was found in a watch, for one operation.
type slowness struct {
	events int
	debt   time.Duration
}

// Begin is to be called before each call.
func (m *Meter) Begin(p *Pace) {
	i := m.index(p)
	if t := p.trials.Load(); t != m.trials[i] {
		m.Settle(monotonic.Now())
		m.trials[i] = t
		m.watchClosely()
	}
	if m.calls == 0 {
		m.crowded = false
		m.of = [3]bool{}
		if m.watch > 0 && m.Switches != nil {
			// On a thread of its own a goroutine sleeps if and only if the thread does.
			runtime.LockOSThread()
			m.slept, m.preempted = m.Switches()
		}
		m.start = monotonic.Now()
	}
	m.of[i] = true
	m.crowded = m.crowded || p.busy.Load() > 0
}

// End is to be called after it.
func (m *Meter) End(p *Pace, bytes int) {
	m.calls++
	m.bytes += bytes
	switch {
	case m.watch > 0:
		took := monotonic.Now() - m.start
		m.calls, m.bytes = 0, 0
		m.add(p, took, bytes, m.innocent(took, bytes))
	case m.calls >= measureCalls || m.bytes >= measureBytes:
		m.Settle(monotonic.Now())
	}
}

// innocent reports whether the call that has just been timed by itself may have taken its time for
// reasons other than that the backend makes it wait. There are three: it was behind workers that
// were making such calls; it has done nothing but compute, and not for long; somebody else had the
// processor. The last does not happen in one call after another; but a thread that is about to
// sleep, for its goroutine, may be preempted for so long that it need not sleep any more.
func (m *Meter) innocent(took time.Duration, bytes int) bool {
	if m.Switches == nil {
		return m.crowded
	}
	slept, preempted := m.Switches()
	runtime.UnlockOSThread()
	awake, alone := slept == m.slept, preempted == m.preempted
	m.excused = awake && !alone && !m.excused
	return m.crowded || m.excused || awake && alone && took <= computeShare*allowed(1, bytes)
}

// Settle looks at the calls that were timed together until now. It is to be called before anything
// else that takes time.
func (m *Meter) Settle(now time.Duration) {
	if m.calls == 0 {
		return
	}
	took := now - m.start
	if took > allowed(m.calls, m.bytes) {
		if !m.crowded {
			m.watchClosely()
		}
		if took >= stall {
			// Whose doing it was is not known.
			for i, p := range m.all() {
				if m.of[i] {
					p.takeOver(0)
				}
			}
		}
	}
	m.calls, m.bytes = 0, 0
}

// Timing reports whether there are calls that Settle would look at.
func (m *Meter) Timing() bool { return m.calls > 0 }

func (m *Meter) watchClosely() {
	m.watch = watchCalls
	m.slow = [3]slowness{}
}

// add takes note of a call that was timed by itself.
func (m *Meter) add(p *Pace, took time.Duration, bytes int, innocent bool) {
	if !m.crowded {
		m.watch--
	}
	s := &m.slow[m.index(p)]
	excess := took - allowed(1, bytes)
	switch {
	case excess <= 0:
		s.debt = max(0, s.debt-credit)
		return
	case innocent:
		return
	}
	s.events++
	s.debt += excess
	if s.events >= slowEvents && s.debt >= slowDebt || took >= stall {
		lost := s.debt
		*s = slowness{}
		p.takeOver(lost)
	}
}

func (m *Meter) all() [3]*Pace { return [3]*Pace{&m.Set.Read, &m.Set.Write, &m.Set.Trim} }

func (m *Meter) index(p *Pace) int {
	switch p {
	case &m.Set.Read:
		return 0
	case &m.Set.Write:
		return 1
	default:
		return 2
	}
}
