package server

import "time"

// A meter times the plain calls that a connection's goroutine makes. The zero value is ready to use.
type meter struct {
	paces *paces

	start        time.Duration // of the calls that are being timed together
	calls, bytes int

	watch int // how many calls are still timed one by one
	slow  [3]slowness
}

// slowness is what was found in a watch, for one operation.
type slowness struct {
	events int
	debt   time.Duration
}

// begin is to be called before each call.
func (m *meter) begin() {
	if m.calls == 0 {
		m.start = clock()
	}
}

// end is to be called after it.
func (m *meter) end(p *pace, bytes int) {
	m.calls++
	m.bytes += bytes
	switch {
	case m.watch > 0:
		took := clock() - m.start
		m.calls, m.bytes = 0, 0
		m.add(p, took, bytes)
	case m.calls >= measureCalls || m.bytes >= measureBytes:
		m.settle(clock())
	}
}

// settle looks at the calls that were timed together until now. It is to be called before anything else that takes time.
func (m *meter) settle(now time.Duration) {
	if m.calls == 0 {
		return
	}
	took := now - m.start
	if took > allowed(m.calls, m.bytes) {
		m.watchClosely()
		if took >= paceStall {
			m.paces.read.takeOver()
			m.paces.write.takeOver()
			m.paces.trim.takeOver()
		}
	}
	m.calls, m.bytes = 0, 0
}

func (m *meter) watchClosely() {
	m.watch = watchCalls
	m.slow = [3]slowness{}
}

// add takes note of a call that was timed by itself.
func (m *meter) add(p *pace, took time.Duration, bytes int) {
	excess := took - allowed(1, bytes)
	if m.watch == 0 {
		if excess <= 0 {
			return
		}
		m.watchClosely()
	}
	m.watch--
	s := &m.slow[m.index(p)]
	if excess <= 0 {
		s.debt = max(0, s.debt-paceCredit)
		return
	}
	s.events++
	s.debt += excess
	if s.events >= slowEvents && s.debt >= slowDebt || took >= paceStall {
		*s = slowness{}
		p.takeOver()
	}
}

func (m *meter) index(p *pace) int {
	switch p {
	case &m.paces.read:
		return 0
	case &m.paces.write:
		return 1
	default:
		return 2
	}
}
