package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

var (
	errEnded = errors.New("the device has been ended")
	errDead  = errors.New("all connections are dead, and the kernel waits for no new one")
)

// hasty is how much earlier than the dead timeout says the kernel may fail what waits for a
// connection, because it has taken the last one for dead before it showed here.
const hasty = 100 * time.Millisecond

// connections are the set of a device's connections: who serves, who is dead, what is left behind,
// and whether it is worth replacing the dead ones. They are served from serve on, until done. Safe
// for concurrent use.
//
// A dead connection is replaced only after attach, and only until reconnecting has ended, which it
// does before done is closed. The last keeper closes done, so nothing uses the backend any more
// then. An expiry is there only while all connections are dead.
type connections struct {
	log *slog.Logger

	// The three are how the set reaches the device. They do not change after serve.

	// renew has the kernel take a new connection in the place of a dead one, and returns what is to
	// serve it.
	renew func(context.Context) (transmitter, error)
	// missed is called when the kernel may have failed writes because there was no connection, and
	// why. Both it and changed are called with mu held, and must not call the set.
	missed func(reason error)
	// changed is called after a change of what state and count return.
	changed func()

	attached chan struct{} // closed when the kernel has the device
	settled  chan struct{} // holds a value when a replacement has come to an end

	done chan struct{} // closed when all have ended, and none will be replaced
	err  error         // why; nil if the kernel has said goodbye; set before done is closed

	// reconnecting ends when no connection is to be replaced any more.
	reconnecting context.Context
	giveUp       context.CancelCauseFunc

	// remote is whether the kernel is connected to a server elsewhere, which may come back after
	// any time, and hears of the device's end what is not heard here. It does not change after
	// serve.
	remote bool

	away atomic.Bool // another process goes on with them; set under mu

	mu                   sync.Mutex    // guards all below
	all                  []*connection // does not change after serve
	alive                int           // how many of all are
	keepers              int           // goroutines that serve a connection, replace it, or wait for one left behind
	goodbye              bool          // the kernel has announced the end
	leaving              bool          // by cut
	held                 chan struct{} // closed when dead ones may be replaced; nil: they may
	replacing            int           // how many replacements are under way
	lost                 error         // what ended the connection that died first of those that are dead
	failing              error         // of the last attempt to replace one of those; nil: there was none
	replaced             int64         // how many connections were
	expiry               *expiry       // of the wait for a new connection; nil: there is none
	timeout, deadTimeout time.Duration
}

// newConnections makes a set of none, on a device that waits for so long for an answer, and for a
// new connection.
func newConnections(timeout, deadTimeout time.Duration, log *slog.Logger) *connections {
	cs := &connections{
		log:         log,
		attached:    make(chan struct{}),
		settled:     make(chan struct{}, 1),
		done:        make(chan struct{}),
		timeout:     timeout,
		deadTimeout: deadTimeout,
	}
	cs.reconnecting, cs.giveUp = context.WithCancelCause(context.Background())
	return cs
}

// serve starts to serve the connections. They end by themselves, by cut, or by the kernel. To be
// called once.
func (cs *connections) serve(conns []transmitter) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for i, t := range conns {
		cs.all = append(cs.all, newConnection(i, t))
	}
	cs.alive, cs.keepers = len(conns), len(conns)
	for _, c := range cs.all {
		go cs.keep(c)
	}
}

// keep serves a connection, and what takes its place.
func (cs *connections) keep(c *connection) {
	for cs.transmit(c) && cs.reconnect(c) {
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.unkeep()
}

// attach says that the kernel has the device: connections that die, or have, are replaced from now
// on. To be called once at most.
func (cs *connections) attach() { close(cs.attached) }

// retire has no connection replaced any more. Those that are served go on.
func (cs *connections) retire() { cs.giveUp(errEnded) }

// unkeep ends the set with its last keeper. The caller holds mu.
func (cs *connections) unkeep() {
	if cs.keepers--; cs.keepers > 0 {
		return
	}
	cs.retire()
	cs.unexpire()
	switch {
	case cs.away.Load():
		cs.err = ErrHandedOver
	case !cs.goodbye:
		cs.err = cs.lost
		cs.missed(cs.lost)
	}
	close(cs.done)
	cs.changed()
}

// transmit serves a connection to its end, and reports whether another one should take its place.
// What the backend has not let go of is left behind then.
func (cs *connections) transmit(c *connection) bool {
	t, result := c.conn, make(chan error, 1)
	go func() { result <- t.Transmit() }()
	var err error
	behind := false
	select {
	case err = <-result:
		cs.died(c)
	case <-t.Stopped():
		cs.died(c)
		if t.Disconnected() || t.Stats().InFlight == 0 {
			err = <-result // at once, or the device has nothing left to go on for
		} else {
			behind = true
			cs.leaveBehind(c, t, result)
		}
	}
	// The kernel must see that nobody is there, whatever the reason. It has hung up on one that is
	// still away, and what it said before is to be read yet; that one is closed later.
	if !behind || !t.Away() {
		t.Close()
	}
	if t.Disconnected() {
		cs.leave() // It may have taken a moment to know that.
		return false
	}
	err = fmt.Errorf("blockdev: connection %d ended without a disconnect: %w", c.number, reason(err))
	cs.blame(err)
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if !cs.leaving && !cs.away.Load() {
		cs.log.Warn("connection lost", "alive", cs.alive, "err", err)
	}
	return true
}

// leaveBehind has the device go on without a connection that the backend has not let go of yet.
// What that is at work on is safe from newer requests, and they from it (package server, "What a
// client can rely on").
func (cs *connections) leaveBehind(c *connection, t transmitter, result <-chan error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.behind[t] = struct{}{}
	cs.keepers++
	go func() {
		<-result
		t.Close()
		cs.mu.Lock()
		defer cs.mu.Unlock()
		if t.Disconnected() {
			cs.goodbye = true
			cs.retire()
		}
		delete(c.behind, t)
		if t != c.conn {
			c.fold(t)
		}
		cs.unkeep()
	}()
}

// reason says why a connection has ended that was not disconnected.
func reason(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF // The kernel takes the server for dead, as after a timeout.
	}
	return err
}

// blame notes why a connection has died, or is about to, unless another one has died before.
func (cs *connections) blame(err error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.lost == nil {
		cs.lost = err
	}
}

// died notes that a connection is not served any more, and for how long it is worth replacing it:
// as long as another one serves, and with none left until the kernel has failed what waited for
// one. Each request has its timeout, and then the wait for a connection.
func (cs *connections) died(c *connection) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.died(cs.timeout)
	cs.alive--
	switch {
	case c.conn.Disconnected():
		cs.goodbye = true
		cs.retire()
	case cs.alive == 0 && cs.deadTimeout == 0 && !cs.remote:
		cs.giveUp(errDead)
	case cs.alive == 0 && cs.reconnecting.Err() == nil && !cs.remote:
		e := &expiry{limit: cs.timeout + cs.deadTimeout}
		e.timer = time.AfterFunc(e.limit, func() { cs.expire(e) })
		cs.expiry = e
	}
	cs.changed()
}

// An expiry ends the wait for a new connection, while all are dead.
type expiry struct {
	limit time.Duration
	timer *time.Timer
}

// expire gives up a wait, unless it has ended: its timer may fire while restore is at work, too
// late to be stopped.
func (cs *connections) expire(e *expiry) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.expiry == e {
		cs.giveUp(fmt.Errorf("all connections are dead for %v", e.limit))
	}
}

// unexpire ends a wait for a new connection, if there is one. The caller holds mu.
func (cs *connections) unexpire() {
	if cs.expiry != nil {
		cs.expiry.timer.Stop()
		cs.expiry = nil
	}
}

// restore puts a new connection in the place of a dead one.
func (cs *connections) restore(c *connection, t transmitter) error {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.reconnecting.Err() != nil {
		return context.Cause(cs.reconnecting)
	}
	c.restored(t)
	if gap := cs.gap(); cs.alive == 0 && gap+hasty >= cs.deadTimeout {
		cs.missed(fmt.Errorf("there was none for %v", gap))
	}
	if !isUnseen(t) {
		cs.replaced++
	}
	if cs.alive++; cs.alive == len(cs.all) {
		cs.lost, cs.failing = nil, nil
	}
	cs.unexpire()
	cs.changed()
	return nil
}

// cut ends all connections at once, and for good. Their goroutines end when the backend calls in
// flight have.
func (cs *connections) cut() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.leaving = true
	cs.retire()
	for _, c := range cs.all {
		c.conn.Close()
	}
	cs.changed()
}

// setTimeouts says for how long the kernel waits for an answer, and for a new connection, from now
// on. Nil is no change.
func (cs *connections) setTimeouts(timeout, deadTimeout *time.Duration) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if timeout != nil {
		cs.timeout = *timeout
	}
	if deadTimeout != nil {
		cs.deadTimeout = *deadTimeout
	}
}

// timeouts returns for how long the kernel waits for an answer, and for a new connection.
func (cs *connections) timeouts() (timeout, deadTimeout time.Duration) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.timeout, cs.deadTimeout
}

// count returns how many connections are served.
func (cs *connections) count() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.alive
}

// stats returns what each connection has served.
func (cs *connections) stats() []server.Stats {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	stats := make([]server.Stats, len(cs.all))
	for i, c := range cs.all {
		stats[i] = c.stats()
	}
	return stats
}

// unserved reports whether there is nobody to write to. A write of what is cached can only fail
// then, even of nothing at all. Nothing is hidden by leaving it out: with all connections dead,
// missed was called, or will be, and whoever cuts gives up what is cached.
func (cs *connections) unserved() bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.leaving || cs.alive == 0 && cs.reconnecting.Err() != nil && !cs.goodbye
}

// disconnected reports whether the kernel has announced the end of the device and nothing is served
// any more.
func (cs *connections) disconnected() bool {
	select {
	case <-cs.done:
		return cs.err == nil
	default:
		return false
	}
}

// state returns the state of a device with these connections (Device.State).
func (cs *connections) state() nbdnl.State {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	switch {
	case cs.keepers == 0 && (cs.goodbye || cs.away.Load()):
		return nbdnl.StateIdle
	case cs.keepers == 0:
		return nbdnl.StateOrphaned
	case cs.goodbye || cs.leaving:
		return nbdnl.StateDisconnecting
	case cs.alive == len(cs.all):
		return nbdnl.StateLive
	case cs.alive > 0:
		return nbdnl.StateDegraded
	case cs.reconnecting.Err() == nil:
		return nbdnl.StateWaiting
	default:
		return nbdnl.StateOrphaned
	}
}
