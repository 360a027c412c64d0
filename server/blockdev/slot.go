package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

var (
	errEnded = errors.New("the device has been ended")
	errDead  = errors.New("all connections are dead, and the kernel waits for no new one")
)

// hasty is how much earlier than DeadTimeout says the kernel may fail what waits for a connection,
// because it has taken the last one for dead before it showed here.
const hasty = 100 * time.Millisecond

// A slot is one of the kernel's places for a connection. When the connection in it dies, another
// one is put there. Its fields are guarded by the device's mu.
type slot struct {
	number int
	conn   *server.Conn              // the present one, or the last
	behind map[*server.Conn]struct{} // dead ones that the backend has not let go of
	past   server.Stats              // of those before
	alive  bool                      // conn is served
	dead   time.Time                 // when the kernel has taken the last one for dead that was, at the earliest
}

func newSlot(number int, c *server.Conn) *slot {
	return &slot{number: number, conn: c, behind: make(map[*server.Conn]struct{}), alive: true}
}

func (s *slot) stats() server.Stats {
	stats, now := s.past, s.conn.Stats()
	stats.Add(&now)
	for c := range s.behind {
		if c != s.conn {
			now = c.Stats()
			stats.Add(&now)
		}
	}
	return stats
}

// fold keeps the counts of a connection whose place another one has, without keeping it.
func (s *slot) fold(c *server.Conn) {
	stats := c.Stats()
	s.past.Add(&stats)
}

// serve starts to serve the connections. They end by themselves, by cut, or by the kernel.
func (d *Device) serve(ends []link) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, end := range ends {
		d.slots = append(d.slots, newSlot(i, d.export.NewConn(end.open(), end.unread)))
	}
	d.alive, d.keepers = len(ends), len(ends)
	for _, s := range d.slots {
		go d.keep(s)
	}
}

// keep serves what is in a slot, one connection after the other.
func (d *Device) keep(s *slot) {
	for d.transmit(s) && d.heal(s) {
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unkeep()
}

// unkeep ends the device with its last keeper. The caller holds mu.
func (d *Device) unkeep() {
	if d.keepers--; d.keepers > 0 {
		return
	}
	d.giveUp(errEnded)
	d.unexpire()
	if !d.goodbye {
		d.err = d.lost
		d.misses(d.lost)
	}
	close(d.done)
	d.changed()
}

// transmit serves the connection in a slot to its end, and reports whether another one should take
// its place. What the backend has not let go of is left behind then.
func (d *Device) transmit(s *slot) bool {
	c, result := s.conn, make(chan error, 1)
	go func() { result <- c.Transmit() }()
	var err error
	behind := false
	select {
	case err = <-result:
		d.died(s)
	case <-c.Stopped():
		d.died(s)
		if c.Disconnected() || c.Stats().InFlight == 0 {
			err = <-result // at once, or the device has nothing left to go on for
		} else {
			behind = true
			d.leaveBehind(s, c, result)
		}
	}
	// The kernel must see that nobody is there, whatever the reason. It has hung up on one that is
	// still away, and what it said before is to be read yet; that one is closed later.
	if !behind || !c.Away() {
		c.Close()
	}
	if c.Disconnected() {
		return false
	}
	err = fmt.Errorf("blockdev: connection %d ended without a disconnect: %w", s.number, reason(err))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost == nil {
		d.lost = err
	}
	if !d.leaving {
		d.log.Warn("connection lost", "alive", d.alive, "err", err)
	}
	return true
}

// leaveBehind has the device go on without a connection that the backend has not let go of yet.
// What that is at work on is safe from newer requests, and they from it (package server, "What a
// client can rely on").
func (d *Device) leaveBehind(s *slot, c *server.Conn, result <-chan error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.behind[c] = struct{}{}
	d.keepers++
	go func() {
		<-result
		c.Close()
		d.mu.Lock()
		defer d.mu.Unlock()
		if c.Disconnected() {
			d.goodbye = true
			d.giveUp(errEnded)
		}
		delete(s.behind, c)
		if c != s.conn {
			s.fold(c)
		}
		d.unkeep()
	}()
}

// reason says why a connection has ended that was not disconnected.
func reason(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF // The kernel takes the server for dead, as after a timeout.
	}
	return err
}

// overdue is by how much a request may exceed the timeouts before the server answers it itself.
// With what the kernel adds, that is 10 seconds at most.
const overdue = 7 * time.Second

// bePatient tells the server for how long the kernel is. The caller holds mu, or is alone.
func (d *Device) bePatient() {
	d.export.SetPatience(server.Patience{Resend: d.timeout, Total: d.timeout + d.deadTime + overdue})
}

// died notes that the connection in a slot is served no more.
func (d *Device) died(s *slot) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.alive, s.dead = false, time.Now()
	// The kernel gives a connection up when a request has had its time, which was not seen while
	// the loop was in a call of the backend.
	if late := s.conn.Absence() - d.timeout; late > 0 {
		s.dead = s.dead.Add(-late)
	}
	d.alive--
	switch {
	case s.conn.Disconnected():
		d.goodbye = true
		d.giveUp(errEnded)
	case d.alive == 0 && d.deadTime == 0:
		d.giveUp(errDead)
	case d.alive == 0 && d.mending.Err() == nil:
		e := &expiry{limit: d.patience()}
		e.timer = time.AfterFunc(e.limit, func() { d.expire(e) })
		d.expiry = e
	}
	d.changed()
}

// An expiry ends the wait for a new connection, while all are dead.
type expiry struct {
	limit time.Duration
	timer *time.Timer
}

// expire gives up a wait, unless it has ended: its timer may fire while revive is at work, too late
// to be stopped.
func (d *Device) expire(e *expiry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.expiry == e {
		d.giveUp(fmt.Errorf("all connections are dead for %v", e.limit))
	}
}

// revive puts a new connection into a slot.
func (d *Device) revive(s *slot, c *server.Conn) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mending.Err() != nil {
		return context.Cause(d.mending)
	}
	if _, ok := s.behind[s.conn]; !ok {
		s.fold(s.conn)
	}
	s.conn, s.alive = c, true
	if gap := d.gap(); d.alive == 0 && gap+hasty >= d.deadTime {
		d.misses(fmt.Errorf("there was none for %v", gap))
	}
	if d.alive++; d.alive == len(d.slots) {
		d.lost = nil
	}
	d.unexpire()
	d.changed()
	return nil
}

// gap returns for how long there has been no connection for the kernel, at the most, if there is
// none. The caller holds mu.
func (d *Device) gap() time.Duration {
	var last time.Time
	for _, s := range d.slots {
		if s.dead.After(last) {
			last = s.dead
		}
	}
	return time.Since(last)
}

// unexpire ends a wait for a new connection, if there is one. The caller holds mu.
func (d *Device) unexpire() {
	if d.expiry != nil {
		d.expiry.timer.Stop()
		d.expiry = nil
	}
}

// cut ends all connections at once, and for good. Their goroutines end when the backend calls in
// flight have.
func (d *Device) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leaving = true
	d.giveUp(errEnded)
	for _, s := range d.slots {
		s.conn.Close()
	}
	d.changed()
}

// Alive returns how many of the device's connections are served. One whose loop is in a call of a
// backend that takes writes without blocking (backends.WriterAtFrom) counts until that returns.
func (d *Device) Alive() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.alive
}

// State returns what the device is doing: StateLive; StateDegraded while some of its connections
// are dead; StateWaiting while all are, and requests wait for a new one; StateDisconnecting when
// its end has begun; after Done, StateIdle if it was disconnected in order, else StateOrphaned, as
// is a device all of whose connections are dead for good.
func (d *Device) State() nbdnl.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.keepers == 0 && d.goodbye:
		return nbdnl.StateIdle
	case d.keepers == 0:
		return nbdnl.StateOrphaned
	case d.goodbye || d.leaving:
		return nbdnl.StateDisconnecting
	case d.alive == len(d.slots):
		return nbdnl.StateLive
	case d.alive > 0:
		return nbdnl.StateDegraded
	case d.mending.Err() == nil:
		return nbdnl.StateWaiting
	default:
		return nbdnl.StateOrphaned
	}
}

// Changes returns a channel from which something can be received after State, Alive, Size, Timeout
// or DeadTimeout have changed, or something was lost while all that had been was acknowledged, once
// for all changes since. It is for one receiver, and is never closed.
func (d *Device) Changes() <-chan struct{} { return d.changes }

// changed tells of a change.
func (d *Device) changed() {
	select {
	case d.changes <- struct{}{}:
	default:
	}
}
