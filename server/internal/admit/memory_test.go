package admit

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A clerk takes memory for clients, and notes who got some.
type clerk struct {
	t    *testing.T
	took chan string
}

func (c clerk) take(name string, a *Account, bytes int64) {
	go func() {
		if !a.Take(bytes) {
			name += " nothing"
		}
		c.took <- name
	}()
	synctest.Wait()
}

// TestMemory holds who gets what does not fit in a share: nobody beyond the limit but one alone,
// and nobody before those who have waited for longer.
func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMemory(200, 10) // 10 for each, and 100 for the rest
		open := func() *Account { return m.Open(func() { t.Error("somebody is stalled") }) }
		first, second := open(), open()
		if !first.TryTake(70) || second.TryTake(51) || !second.TryTake(50) {
			t.Errorf("%d of 100 are used", m.used)
		}
		c := clerk{t, make(chan string)}
		gone, large, little := open(), open(), open()
		c.take("large", large, 500)
		c.take("gone", gone, 11)
		c.take("little", little, 11)
		var got []string
		first.GiveBack(70)
		gone.Close()
		got = append(got, <-c.took)
		c.take("late", gone, 1)
		got = append(got, <-c.took)
		if first.TryTake(11) {
			t.Error("something was given to others than who waits")
		}
		if !first.TryTake(10) {
			t.Error("who waits keeps others from their share")
		}
		time.Sleep(3*turn + time.Second)
		second.GiveBack(50)
		got = append(got, <-c.took)
		time.Sleep(turn) // It is another one's turn to be the first.
		if m.used != 490 || len(m.queue) != 1 || second.TryTake(11) {
			t.Errorf("%d are used, %d wait", m.used, len(m.queue))
		}
		large.GiveBack(500)
		got = append(got, <-c.took)
		if want := []string{"gone nothing", "late nothing", "large", "little"}; !slices.Equal(got, want) {
			t.Errorf("memory went to %v, want %v", got, want)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		little.GiveBack(11)
		first.GiveBack(10)
		if m.turn.Load() != 3 || m.used != 0 || m.timing {
			t.Errorf("in the end %d are used, turn %d, timing %v", m.used, m.turn.Load(), m.timing)
		}
	})
}

// TestShare holds that a client whose requests fit in its share never waits, and that memory stays
// within its limit, whatever the others do.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clients, most = 1000, 512 << 20
		m := NewMemory(most, clients+24)
		c := clerk{t, make(chan string, clients)}
		for i := range clients {
			a := m.Open(func() {})
			a.TryTake(m.share)
			c.take(fmt.Sprint(i), a, 32<<20)
			a.Receiving()
		}
		honest := m.Open(func() { t.Error("who holds no more than its share is stalled") })
		honest.Receiving()
		for range 100 {
			if !honest.TryTake(m.share) {
				t.Fatal("the share is not there")
			}
			time.Sleep(turn)
			honest.GiveBack(m.share)
		}
		var held int64
		for a := range m.accounts {
			held += a.held
		}
		if held > most || m.used > m.rest || m.rest+m.share*(clients+24) != most {
			t.Errorf("%d of %d bytes are held, %d of %d beyond the shares", held, most, m.used, m.rest)
		}
		for a := range m.accounts {
			a.Close()
		}
	})
}

// TestStalled holds who is disconnected where others wait: who makes the server wait for patience
// turns and holds more than its share, and nobody else.
func TestStalled(t *testing.T) {
	receives := func(a *Account, _ *Ticket) { a.Receiving() }
	keeps := func(a *Account, t *Ticket) { a.Ready(t) }
	for _, tt := range []struct {
		name    string
		bytes   int64
		does    func(a *Account, t *Ticket)
		stops   func(a *Account, t *Ticket) // half-way, or nil
		stalled bool
	}{
		{"sends nothing", 60, receives, nil, true},
		{"sends nothing, within its share", 10, receives, nil, false},
		{"sends in the end", 60, receives, func(a *Account, _ *Ticket) { a.Received() }, false},
		{"takes no reply", 60, keeps, nil, true},
		{"takes no reply, within its share", 10, keeps, nil, false},
		{"takes the reply in the end", 60, keeps, func(_ *Account, t *Ticket) { t.Taken() }, false},
		{"takes one reply of two", 60, func(a *Account, t *Ticket) { a.Ready(new(Ticket)); a.Ready(t) },
			func(_ *Account, t *Ticket) { t.Taken() }, true},
		{"waits for its backend", 60, func(*Account, *Ticket) {}, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := NewMemory(200, 10)
				var stalled atomic.Int32
				ticket := new(Ticket)
				a := m.Open(func() { stalled.Add(1) })
				if !a.TryTake(tt.bytes) {
					t.Fatal("nothing there")
				}
				tt.does(a, ticket)
				time.Sleep(10 * patience * turn) // Nobody waits.
				others := m.Open(func() { t.Error("who waits is stalled") })
				others.TryTake(110 - max(0, tt.bytes-10))
				c := clerk{t, make(chan string, 1)}
				needy := m.Open(func() { t.Error("who waits is stalled") })
				c.take("needy", needy, 20)
				time.Sleep(patience * turn / 2)
				if stalled.Load() > 0 {
					t.Error("stalled after half of the time")
				}
				if tt.stops != nil {
					tt.stops(a, ticket)
				}
				time.Sleep(patience * turn)
				synctest.Wait()
				if n := stalled.Load(); (n == 1) != tt.stalled || n > 1 {
					t.Errorf("stalled %d times, want %v", n, tt.stalled)
				}
				needy.Close()
				<-c.took
				time.Sleep(turn)
			})
		})
	}
}
