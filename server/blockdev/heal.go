package blockdev

import (
	"context"
	"errors"
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

// patience returns how long it is worth replacing connections when all are dead: after that the
// kernel has failed what waited for one (each request has its timeout, and then the wait for a
// connection). The caller holds mu.
func (d *Device) patience() time.Duration { return d.timeout + d.deadTime }

// heal replaces the dead connection in a slot, and reports whether it could.
//
// The old one must have stopped: the kernel sends again, over another connection, what was in
// flight on it. A backend may still be at work on that, which the server orders before the
// repetition (server.Conn.Stopped).
func (d *Device) heal(s *slot) bool {
	ctx := d.mending // As long as another connection serves it is worth trying; with none left, died sets a limit.
	select {
	case <-d.attached:
	case <-ctx.Done(): // A connect that has failed.
		return false
	}
	log := d.log.With("connection", s.number)
	if d.idle(s) {
		idle := time.NewTimer(idlePause)
		defer idle.Stop()
		select {
		case <-idle.C:
		case <-ctx.Done(): // The first attempt sees to that.
		}
	}
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := d.replace(ctx, s)
		if err == nil {
			log.Info("connection replaced")
			return true
		}
		if beyondHelp(err) {
			d.giveUp(err)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			if pause < longestPause && 2*pause >= longestPause {
				log.Warn("connection can't be replaced at the moment, attempts go on", "err", err) // Said once.
			} else {
				log.Debug("connection not replaced yet", "err", err)
			}
		case <-ctx.Done():
			timer.Stop()
			if cause := context.Cause(ctx); cause != errEnded {
				log.Error("connection was not replaced", "err", err, "cause", cause)
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

// idle reports whether the last connection in a slot has carried nothing.
func (d *Device) idle(s *slot) bool {
	d.mu.Lock()
	c := s.conn
	d.mu.Unlock()
	n := c.Stats()
	return n.InFlight == 0 && n.Read.Requests+n.Write.Requests+n.Flush.Requests+n.Trim.Requests+n.WriteZeroes.Requests+n.Unknown.Requests == 0
}

// replace makes one attempt. That the kernel has taken the connection, and has not shut it down
// again, Reconfigure makes sure of. One that dies later is replaced as any other.
func (d *Device) replace(ctx context.Context, s *slot) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	l, err := openLinks(1, d.machine.sendBuffer(), d.log)
	if err != nil {
		return err
	}
	err = d.reconfigure(ctx, nbdnl.Update{Sockets: l.kernel})
	l.closeKernelEnds()
	if err == nil {
		err = d.revive(s, d.export.NewConn(l.server[0], nil))
	}
	if err != nil {
		l.close()
	}
	return err
}
