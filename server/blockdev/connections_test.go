package blockdev

import (
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestConnectionsGoodbye has the kernel end the device, on one connection before the other.
func TestConnectionsGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(2, 30*time.Second, time.Minute)
		s.check(t, "in the beginning", nbdnl.StateLive, 2)
		s.socket(0).disconnect()
		s.check(t, "after the first goodbye", nbdnl.StateDisconnecting, 1)
		s.socket(1).end(io.ErrUnexpectedEOF) // It is not replaced.
		s.check(t, "in the end", nbdnl.StateIdle, 0)
		if s.err != nil || !s.disconnected() || s.unserved() || len(s.misses) > 0 || len(s.sockets) != 2 {
			t.Errorf("error %v, missed %v, %d sockets", s.err, s.misses, len(s.sockets))
		}
	})
}

// TestConnectionsUnattached holds that nothing is replaced before the kernel has the device, and
// that a set comes to an end that never is attached.
func TestConnectionsUnattached(t *testing.T) {
	for _, attach := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := unattached(1, 30*time.Second, time.Minute)
			s.socket(0).end(io.ErrUnexpectedEOF)
			time.Sleep(longestPause)
			s.check(t, "before", nbdnl.StateWaiting, 0)
			if len(s.sockets) != 1 {
				t.Errorf("%d sockets before the kernel has the device", len(s.sockets))
			}
			if attach {
				s.attach()
				s.check(t, "attached", nbdnl.StateLive, 1)
			}
			s.cut()
			s.check(t, "in the end", nbdnl.StateOrphaned, 0)
		})
	}
}

// TestConnectionsRetired holds that after retire a connection serves on, and is not replaced.
func TestConnectionsRetired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(2, 30*time.Second, time.Minute)
		s.retire()
		s.check(t, "retired", nbdnl.StateLive, 2)
		s.socket(0).end(io.ErrUnexpectedEOF)
		s.check(t, "one is dead", nbdnl.StateDegraded, 1)
		s.socket(1).end(io.ErrClosedPipe)
		s.check(t, "both are", nbdnl.StateOrphaned, 0)
		if !errors.Is(s.err, io.ErrUnexpectedEOF) || len(s.sockets) != 2 {
			t.Errorf("error %v, %d sockets", s.err, len(s.sockets))
		}
	})
}

// TestConnectionsTimeouts holds that the wait for a connection is as long as the timeouts of its
// beginning.
func TestConnectionsTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(1, 30*time.Second, time.Minute)
		s.refuse(io.ErrNoProgress)
		timeout, deadTimeout := time.Second, 2*time.Second
		s.setTimeouts(&timeout, nil)
		s.setTimeouts(nil, &deadTimeout)
		if first, second := s.timeouts(); first != timeout || second != deadTimeout {
			t.Errorf("timeouts %v and %v", first, second)
		}
		s.socket(0).end(io.ErrUnexpectedEOF)
		time.Sleep(timeout + deadTimeout - time.Millisecond)
		s.check(t, "before", nbdnl.StateWaiting, 0)
		time.Sleep(time.Millisecond)
		s.check(t, "after", nbdnl.StateOrphaned, 0)
	})
}

// TestConnectionsRenewed has connections die and be replaced, all but the last first.
func TestConnectionsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(2, 30*time.Second, 10*time.Second)
		s.refuse(io.ErrNoProgress)
		first := s.socket(0)
		set(first, &first.served, 3)
		s.socket(0).end(io.ErrUnexpectedEOF)
		s.check(t, "one is dead", nbdnl.StateDegraded, 1)
		s.socket(1).end(io.ErrUnexpectedEOF)
		s.check(t, "both are", nbdnl.StateWaiting, 0)
		if !get(first, &first.closed) || s.unserved() {
			t.Errorf("the kernel does not see it, or unserved: %t", s.unserved())
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		s.refuse(nil)
		time.Sleep(longestPause)
		s.check(t, "replaced", nbdnl.StateLive, 2)
		if n := s.stats()[0].Read.Requests; n != 4 || len(s.misses) > 0 || s.lost != nil || s.expiry != nil {
			t.Errorf("%d reads, missed %v, lost %v, waits %t", n, s.misses, s.lost, s.expiry != nil)
		}
		time.Sleep(time.Hour) // No wait is left over.
		s.check(t, "much later", nbdnl.StateLive, 2)
		s.cut()
		s.check(t, "cut", nbdnl.StateOrphaned, 0)
	})
}

// TestConnectionsGivenUp holds for how long dead connections are worth replacing, and what the set
// says in the end.
func TestConnectionsGivenUp(t *testing.T) {
	for _, tt := range []struct {
		name                 string
		timeout, deadTimeout time.Duration
		refuse               error
		lasts                time.Duration // after the last connection has died
	}{
		{"nothing to wait for", 30 * time.Second, 0, io.ErrNoProgress, 0},
		{"both timeouts", 3 * time.Second, 4 * time.Second, io.ErrNoProgress, 7 * time.Second},
		{"another's device", 30 * time.Second, time.Minute, nbdnl.ErrNotOwner, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := setOf(1, tt.timeout, tt.deadTimeout)
			s.refuse(tt.refuse)
			s.socket(0).end(io.ErrUnexpectedEOF)
			if tt.lasts > 0 {
				time.Sleep(tt.lasts - time.Millisecond)
				s.check(t, tt.name, nbdnl.StateWaiting, 0)
				time.Sleep(time.Millisecond)
			}
			s.check(t, tt.name, nbdnl.StateOrphaned, 0)
			if !s.unserved() || s.disconnected() || !errors.Is(s.err, io.ErrUnexpectedEOF) ||
				len(s.misses) != 1 || s.misses[0] != s.err {
				t.Errorf("%s: error %v, missed %v", tt.name, s.err, s.misses)
			}
		})
	}
}

// TestConnectionsGap holds that it is told when there was no connection for so long that the kernel
// may have failed writes, reckoned from when the kernel may have given up the last one.
func TestConnectionsGap(t *testing.T) {
	const timeout, deadTimeout = 5 * time.Second, 10 * time.Second
	for _, tt := range []struct {
		absence, gap time.Duration
		told         bool
	}{
		{0, 9 * time.Second, false},
		{0, deadTimeout - hasty, true},
		{timeout, 9 * time.Second, false},
		{timeout + time.Second, 9 * time.Second, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := setOf(1, timeout, deadTimeout)
			s.refuse(io.ErrNoProgress)
			first := s.socket(0)
			set(first, &first.absence, tt.absence)
			s.socket(0).end(io.ErrUnexpectedEOF)
			time.Sleep(tt.gap)
			synctest.Wait()
			if err := s.restore(s.all[0], newSocket()); err != nil {
				t.Error(err)
			}
			if told := len(s.misses) > 0; told != tt.told {
				t.Errorf("away for %v, then none for %v: missed %v", tt.absence, tt.gap, s.misses)
			}
			s.cut()
		})
	}
}

// TestConnectionsBehind replaces a connection that the backend has not let go of: it is counted,
// closed when it is done, and keeps the set from ending before.
func TestConnectionsBehind(t *testing.T) {
	for _, away := range []bool{false, true} {
		for _, goodbye := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				s := setOf(1, 30*time.Second, time.Minute)
				old := s.socket(0)
				set(old, &old.served, 5)
				set(old, &old.away, away)
				old.leave(1)
				s.check(t, "replaced", nbdnl.StateLive, 1)
				if closed := get(old, &old.closed); closed == away {
					t.Errorf("away %t: closed %t", away, closed)
				}
				st, left := s.stats()[0], len(s.all[0].behind)
				if st.InFlight != 1 || st.Read.Requests != 6 || left != 1 {
					t.Errorf("in flight %d, %d reads, %d behind", st.InFlight, st.Read.Requests, left)
				}
				set(old, &old.inFlight, 0)
				if goodbye { // It has read that last.
					set(old, &old.goodbye, true)
				}
				s.socket(1).disconnect()
				old.end(nil)
				s.check(t, "in the end", nbdnl.StateIdle, 0)
				st, left = s.stats()[0], len(s.all[0].behind)
				if st.InFlight != 0 || st.Read.Requests != 6 || left != 0 {
					t.Errorf("in flight %d, %d reads, %d behind in the end", st.InFlight, st.Read.Requests, left)
				}
			})
		}
	}
}

// TestConnectionsHeld holds that the set does not end before the backend has let go of what was
// left behind.
func TestConnectionsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(1, 30*time.Second, 0)
		s.refuse(io.ErrNoProgress)
		old := s.socket(0)
		set(old, &old.away, true)
		old.leave(1)
		synctest.Wait()
		select {
		case <-s.done:
			t.Error("done while the backend is at work")
		default:
		}
		s.blame(io.EOF) // Too late.
		set(old, &old.inFlight, 0)
		old.end(nil)
		s.check(t, "in the end", nbdnl.StateOrphaned, 0)
		if !errors.Is(s.err, io.ErrUnexpectedEOF) {
			t.Errorf("ended with %v", s.err)
		}
	})
}

// TestConnectionsCut holds that nothing is replaced after a cut, and that what was said first is
// why.
func TestConnectionsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(2, 30*time.Second, time.Minute)
		reason := errors.New("a reason")
		s.blame(reason)
		s.cut()
		s.check(t, "cut", nbdnl.StateOrphaned, 0)
		if s.err != reason || !s.unserved() || len(s.sockets) != 2 || s.restore(s.all[0], newSocket()) == nil {
			t.Errorf("error %v, %d sockets", s.err, len(s.sockets))
		}
		if s.changes == 0 {
			t.Error("no change was told")
		}
	})
}
