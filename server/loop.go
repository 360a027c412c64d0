package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/pace"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A loop receives the requests of a connection, one after another, and plans what becomes of each.
// It is all that one goroutine has to itself, which is not that of Transmit, because a backend may
// end the one that it is called on. Others meet it in the Conn: its control, the limits, the flight
// and the outbox.
type loop struct {
	conn   *Conn
	export *Export

	inbox   inbox
	batch   *batch         // nil while there is nothing in it
	payload payload        // of the write that is being executed
	lock    rangelock.Lock // what it changes, if it can take long
	meter   pace.Meter
	current wire.Request   // the one that the loop is at, in one place: to copy what was just written is slow
	judged  resend.Request // what is known of it, if judging
	judging bool           // requests may come again
	inside  bool           // a call of the backend, for it
	absence time.Duration  // from what was received last until what it asked for had an end, here
	chosen  contextSet     // of which the current one tells, if it is a NBD_CMD_BLOCK_STATUS
	result  chan error
}

// run is the goroutine of the loop. It goes on in another one if the backend ends this one
// (runtime.Goexit).
func (l *loop) run() {
	debug.SetPanicOnFault(true) // A fault in the backend's memory is the failure of one request, as recovered has it.
	finished := false
	defer func() {
		if !finished {
			go l.run()
		}
	}()
	err := l.recall()
	if err == nil {
		err = l.serve()
	}
	for l.obey(err) {
		err = l.serve()
	}
	if flush := l.flush(); err == nil {
		err = flush
	}
	l.inbox.since.Store(0)
	finished = true
	l.result <- err
}

// obey carries out what the loop, which has ended with err, was told by control, and reports
// whether it goes on. Not a byte was lost: what had arrived of a request comes first again, and is
// checked anew.
func (l *loop) obey(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	q, goOn := l.conn.control.told()
	if !goOn || l.flush() != nil {
		return false
	}
	if q != nil && l.conn.limit.Drained(&q.dropped) {
		close(q.reached)
		if q.release != nil {
			<-q.release
		}
	}
	return l.conn.control.resume(q)
}

// recall settles the request in which the backend has ended the goroutine of the loop.
func (l *loop) recall() error {
	if !l.inside {
		return nil
	}
	l.inside = false
	return l.settle(&l.current, errNoReturn)
}

// serve is the loop. Each round takes one request from what was received. It returns the reason to
// stop: nil for NBD_CMD_DISC.
func (l *loop) serve() error {
	for !l.conn.control.stopping.Load() {
		if err := l.next(); err != nil {
			return err
		}
		if l.conn.closed.Load() {
			// What was received may come again over another connection, and newer data after it.
			return net.ErrClosed
		}
		if l.current.Command == wire.CmdDisconnect {
			l.conn.disconnected.Store(true)
			return nil
		}
		if err := l.dispatch(&l.current); err != nil {
			return err
		}
		if l.batch != nil && l.batch.full() {
			if err := l.flush(); err != nil {
				return err
			}
		}
	}
	return ErrShutdown
}

// next takes the header of the next request, once its payload is there too if it has a small one.
// When nothing whole is left, the replies so far are sent and more is received, which is where an
// idle connection waits. So a burst of requests is received by one system call and answered by
// another, and nobody ever waits for more requests to come.
func (l *loop) next() error {
	for {
		b := l.inbox.received()
		if header := l.inbox.header; len(b) >= header {
			h := &l.current
			if err := l.decode(h, b); err != nil {
				return err
			}
			l.inbox.expect(h, h.Command == wire.CmdWrite && l.situation(h).gathers())
			if n := h.Payload(l.extended()); n >= largeWrite || len(b)-header >= int(n) {
				l.inbox.take(header)
				return nil
			}
		}
		if err := l.wait(); err != nil {
			return err
		}
	}
}

// extended reports whether headers are extended ones.
func (l *loop) extended() bool { return l.inbox.header == wire.ExtendedRequestSize }

// decode reads the header at the beginning of b, which is whole.
func (l *loop) decode(h *wire.Request, b []byte) error {
	if l.extended() {
		return h.DecodeExtended((*[wire.ExtendedRequestSize]byte)(b))
	}
	return h.Decode((*[wire.RequestSize]byte)(b))
}

// putBack makes a request, of whose payload that much has come, the beginning of what is unread.
func (l *loop) putBack(h *wire.Request, payload []byte) {
	var header []byte
	if l.extended() {
		header = h.AppendExtended(nil)
	} else {
		header = h.Append(nil)
	}
	l.inbox.putBack(append(header, payload...))
}

// wait sends the replies so far and receives more. While it waits, the connection holds no large
// buffer.
func (l *loop) wait() error {
	if err := l.flush(); err != nil {
		return err
	}
	if err := l.inbox.receive(); err != nil {
		return err
	}
	l.absence = 0
	return nil
}

// flush sends the batch, if there is one.
func (l *loop) flush() error {
	b := l.batch
	if b == nil && !l.meter.Timing() {
		return nil // without a look at the clock, which is a system call on some machines
	}
	now := clock()
	took := now - l.inbox.arrived()
	l.absence = took
	l.meter.Settle(now)
	if b == nil {
		return nil
	}
	l.conn.counters.Publish(&b.tally, took)
	if took >= l.export.slowRequest {
		for _, h := range b.asked[:b.replies] {
			l.export.noteSlow(h, took)
		}
	}
	l.inbox.yields.since = now
	err := l.conn.outbox.flush(b)
	l.batch = nil
	faulted := b.faulted
	b.reset()
	b.release()
	batches.Put(b)
	if faulted != nil || err != nil {
		l.failFaulted(faulted, err)
	}
	return err
}

// dispatch carries out a request whose header was taken. Its error is that of the connection.
func (l *loop) dispatch(h *wire.Request) error {
	e := l.export
	var refused error // nil: the request may reach the backend
	l.chosen = allContexts
	if h.Command == wire.CmdBlockStatus && h.Payload(l.extended()) > 0 {
		refused = l.choose(h)
	}
	if refused == nil {
		if r := e.check(*h, &l.conn.agreed); r != nil {
			refused = r
		}
	}
	if e.judge.Active() {
		now := l.inbox.arrived()
		l.judged, l.judging = e.judge.Judge(now, keyOf(h)), true
		if refused == nil && e.judge.Late(now, l.judged) {
			refused = errOverdue
			l.conn.flight.told(l.judged, now, e.judge.Patience())
		}
	} else if l.judging {
		l.judging = false
	}
	if l.conn.left.Load() || h.Changes() && l.outdated() {
		return errHungUp
	}
	s := l.situation(h)
	s.refused = refused != nil
	p := planOf(h, e.can, s)
	if p == planGather {
		if err := l.gather(h); err != nil {
			return err
		}
		p = planOf(h, e.can, l.situation(h))
	}
	switch p {
	case planCut:
		return fmt.Errorf("a %v with %d bytes: more than %d", h.Command, h.Length, wire.MaxPayload)
	case planRefuse:
		return l.refuse(h, refused)
	case planNothing:
		return l.succeed(h)
	case planReadTo:
		return l.readTo(h)
	case planRead:
		return l.read(h)
	case planWriteFrom:
		return l.writeFrom(h)
	case planWrite:
		return l.write(h)
	default:
		return l.execute(h)
	}
}

// situation is the one that a request is met in, if it is not refused.
func (l *loop) situation(h *wire.Request) situation {
	p := l.export.pace(h)
	return situation{
		payload: h.Payload(l.extended()),
		inline:  p != nil && l.export.inline(p),
		arrived: uint64(len(l.inbox.received())) >= h.Length,
		room:    l.inbox.holds(h.Length),
		counted: l.conn.account != nil,
	}
}
