package server

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// phase is where in its life a connection is.
type phase int

const (
	phaseNew phase = iota
	phaseServing
	phaseEnded // no request in flight, nothing will be read or written any more
)

// A control is how others have a say in the loop of a connection, wherever it is waiting for its
// client. There are three commands:
//
//   - stop: the loop ends;
//   - quiesce: it begins nothing more until all that it has begun is answered, or for longer;
//   - giveUp: it gives up what it holds for a payload that has not all come, and begins that
//     request anew.
//
// A read that waits is interrupted by the read deadline of the socket, which nobody else touches.
// No byte is lost by that: what has come of a request is the first that is received afterwards.
// Between two reads the loop finds the deadline at its next one, and to have no command costs it
// nothing. Commands reach a connection that is being served; others have nothing to be told. Safe
// for concurrent use.
type control struct {
	nc       net.Conn
	stopping atomic.Bool // changes under mu

	mu    sync.Mutex // guards all below
	phase phase
	again bool // giveUp was called, and the loop has not come back yet
	quiet *quiescence
}

// A quiescence is one call of quiesce.
type quiescence struct {
	reached chan struct{} // closed when all that was begun is answered
	dropped atomic.Bool   // nobody waits for that any more
	release chan struct{} // the loop begins nothing before it is closed; nil: it goes on at once
}

// interrupted is the deadline that ends a read.
var interrupted = time.Unix(1, 0)

// deadline sets the read deadline. It fails on a closed connection, whose loop ends by itself. The
// caller holds mu.
func (k *control) deadline(t time.Time) { _ = k.nc.SetReadDeadline(t) }

// begin has the loop served, once.
func (k *control) begin() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch k.phase {
	case phaseServing:
		return errors.New("server: Transmit was called before")
	case phaseEnded:
		return ErrShutdown
	}
	k.phase = phaseServing
	return nil
}

// serving reports whether the loop runs, or what it has begun.
func (k *control) serving() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.phase == phaseServing
}

// preclude ends what has not begun, and reports whether it did.
func (k *control) preclude() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase != phaseNew {
		return false
	}
	k.phase = phaseEnded
	return true
}

// end is called when the loop has ended, and nothing is in flight. The next owner of the socket
// does not inherit a deadline.
func (k *control) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopping.Load() || k.again || k.quiet != nil {
		k.deadline(time.Time{})
	}
	k.phase = phaseEnded
}

// stop has the loop end, also in the middle of a request.
func (k *control) stop() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase != phaseServing {
		return nil
	}
	k.stopping.Store(true)
	return k.nc.SetReadDeadline(interrupted)
}

// quiesce has the loop begin nothing more until all that it has begun is answered, and then, unless
// release is nil, until that is closed. It returns nil if there is no loop. The last call counts:
// the one before it must have come to an end, or be dropped.
func (k *control) quiesce(release chan struct{}) *quiescence {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase != phaseServing {
		return nil
	}
	k.quiet = &quiescence{reached: make(chan struct{}), release: release}
	k.deadline(interrupted)
	return k.quiet
}

// giveUp has the loop, should it be waiting for the rest of a payload, begin that request anew.
func (k *control) giveUp() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase == phaseServing {
		k.again = true
		k.deadline(interrupted)
	}
}

// told returns what the loop, whose read was interrupted, was told: go is false if it is to end, or
// was told nothing. Else it carries out q, unless that is nil, and calls resume.
func (k *control) told() (q *quiescence, goOn bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.quiet, k.again || k.quiet != nil
}

// resume lets the loop read again after q, which it was told, and reports whether it may. If there
// is a later quiescence its next read is interrupted, too.
func (k *control) resume(q *quiescence) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopping.Load() {
		return false
	}
	k.again = false
	if k.quiet == q {
		k.quiet = nil
		k.deadline(time.Time{})
	}
	return true
}
