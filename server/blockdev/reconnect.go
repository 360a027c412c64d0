package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

const (
	// firstPause and longestPause lie between attempts to replace a connection.
	firstPause   = 10 * time.Millisecond
	longestPause = 2 * time.Second
	// idlePause comes before the first attempt if the dead connection has not carried anything. The
	// kernel's receiver of the one before may have shut it down (nbdnl.ErrShutDown) so late that
	// Reconfigure had no knowledge of it, and the next one may do well; but where each one dies at
	// once, the kernel and the log have peace for so long.
	idlePause = 100 * time.Millisecond
	// commandPatience bounds one attempt: a command of somebody else may be stuck in the kernel.
	commandPatience = 10 * time.Second
)

// A reconnection is the replacement of one dead connection.
type reconnection struct {
	attempt func(context.Context) error // makes one attempt
	giveUp  func(error)                 // is called when no attempt can succeed, and ends the context of run
	idle    bool                        // the dead connection has carried nothing
	spread  bool                        // others may have lost theirs at the same time
	log     *slog.Logger
}

// run makes attempts until one succeeds, or ctx ends, and reports whether one did.
func (r reconnection) run(ctx context.Context) bool {
	if r.idle {
		idle := time.NewTimer(idlePause)
		defer idle.Stop()
		select {
		case <-idle.C:
		case <-ctx.Done(): // The first attempt sees to that.
		}
	}
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := r.attempt(ctx)
		if err == nil {
			return true
		}
		if beyondHelp(err) {
			r.giveUp(err)
		}
		now := pause
		if r.spread {
			now = pause*3/4 + rand.N(pause/2)
		}
		timer := time.NewTimer(now)
		select {
		case <-timer.C:
			if pause < longestPause && 2*pause >= longestPause {
				r.log.Warn("connection can't be replaced at the moment, attempts go on", "err", err) // Said once.
			} else {
				r.log.Debug("connection not replaced yet", "err", err)
			}
		case <-ctx.Done():
			timer.Stop()
			if cause := context.Cause(ctx); cause != errEnded {
				r.log.Error("connection was not replaced", "err", err, "cause", cause)
			}
			return false
		}
	}
}

// beyondHelp reports whether the device has no use for connections any more, or whether this kernel
// offers no way to replace them.
func beyondHelp(err error) bool {
	return missing(err) || errors.Is(err, os.ErrPermission) || errors.Is(err, errors.ErrUnsupported)
}

// reconnect replaces a dead connection, and reports whether it could.
//
// The old one must have stopped: the kernel sends again, over another connection, what was in
// flight on it. A backend may still be at work on that, which the server orders before the
// repetition (server.Conn.Stopped).
func (cs *connections) reconnect(c *connection) bool {
	select {
	case <-cs.attached:
	case <-cs.reconnecting.Done(): // A connect that has failed.
		return false
	}
	cs.mu.Lock()
	idle := c.conn.Idle()
	cs.mu.Unlock()
	log := cs.log.With("connection", c.number)
	if !(reconnection{
		attempt: func(ctx context.Context) error { return cs.replace(ctx, c) },
		giveUp:  cs.beyondHelp,
		idle:    idle,
		spread:  cs.remote,
		log:     log,
	}).run(cs.reconnecting) {
		return false
	}
	if isUnseen(c.conn) {
		log.Info("connection is alive, though not seen here")
	} else {
		log.Info("connection replaced")
	}
	return true
}

// beyondHelp has nothing replaced any more, because of an answer of the kernel.
func (cs *connections) beyondHelp(err error) {
	if cs.remote && missing(err) {
		cs.leave()
	}
	cs.giveUp(err)
}

// replace makes one attempt. That the kernel has taken the connection, and has not shut it down
// again, Reconfigure makes sure of. One that dies later is replaced as any other.
func (cs *connections) replace(ctx context.Context, c *connection) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := cs.begin(ctx); err != nil {
		return err
	}
	defer cs.settle()
	t, err := cs.renew(ctx)
	if err != nil {
		cs.failed(err)
		return err
	}
	if err := cs.restore(c, t); err != nil {
		t.Close()
		return err
	}
	return nil
}

// renew gives the kernel a new connection in the place of a dead one. If the kernel has one there
// that is not seen here, renew returns what stands in for that.
func (d *Device) renew(ctx context.Context) (transmitter, error) {
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	if d.export == nil && d.gone(ctx) { // A server that is away can't be asked whether it was told.
		return nil, fmt.Errorf("blockdev: %s: %w", d.Path(), nbdnl.ErrNotConnected)
	}
	heard, err := d.unseen.listen()
	if err != nil {
		return nil, &connectError{err}
	}
	made, err := d.source.connect(ctx, 1)
	if err != nil {
		return nil, &connectError{err}
	}
	if err := d.reconfigure(ctx, nbdnl.Update{Sockets: made.kernel}); err != nil {
		made.close()
		if d.unseen != nil && errors.Is(err, nbdnl.ErrNoDeadConnection) {
			return d.unseen.find(heard), nil
		}
		return nil, err
	}
	made.release()
	return made.conns[0], nil
}

// A connectError is why there was no connection to give to the kernel. It does not unwrap, lest it
// be taken for the kernel's answer: a server's socket file may be missing, and the device is not.
type connectError struct{ err error }

func (e *connectError) Error() string { return e.err.Error() }
