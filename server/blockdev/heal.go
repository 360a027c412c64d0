package blockdev

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

const (
	// firstPause and longestPause lie between attempts to replace a connection. The kernel may need a moment to notice that the
	// old one is dead, and drops the new one until then.
	firstPause   = 10 * time.Millisecond
	longestPause = 2 * time.Second
	// settleTime is given to the kernel before a connection is replaced that it has declared dead. The worker which received from
	// that one may not have noticed yet, and it holds no reference: RECONFIGURE takes the socket away under it
	// (nbd_reconnect_socket). Linux 7.2 was seen to crash of it (recv_work, scm_recv_unix).
	settleTime = 100 * time.Millisecond
	// commandPatience bounds one attempt: a command of somebody else may be stuck in the kernel.
	commandPatience = 10 * time.Second
)

// errDropped means that the kernel has not taken a connection: it knows of no dead one.
var errDropped = errors.New("the kernel has not taken it, as if no connection were dead")

// patience returns how long it is worth replacing connections when all are dead: after that the kernel has failed what waited for
// one (each request has its timeout, and then the wait for a connection). The caller holds mu.
func (d *Device) patience() time.Duration { return d.timeout + d.deadTime }

// heal replaces the dead connection in a slot, and reports whether it could.
//
// The old one must have ended: the kernel sends again, over another connection, what was in flight on it. A backend that is still
// at work on the old request could, when newer data were written after the repetition, overwrite them.
func (d *Device) heal(s *slot) bool {
	ctx := d.mending // As long as another connection serves it is worth trying; with none left, died sets a limit.
	select {
	case <-d.attached:
	case <-ctx.Done(): // A connect that has failed.
		return false
	}
	log := d.log.With("connection", s.number)
	settled := time.NewTimer(settleTime)
	defer settled.Stop()
	select {
	case <-settled.C:
	case <-ctx.Done(): // The first attempt sees to that.
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

// beyondHelp reports whether the device has no use for connections any more, or whether this kernel offers no way to replace them.
func beyondHelp(err error) bool {
	return missing(err) || errors.Is(err, os.ErrPermission) || errors.Is(err, errors.ErrUnsupported)
}

// replace makes one attempt.
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
	// What the kernel drops it drops silently. Then there is no copy left, and the connection ends.
	if err == nil && hungUp(l.server[0]) {
		err = errDropped
	}
	if err == nil {
		err = d.revive(s, d.export.NewConn(l.server[0], nil))
	}
	if err != nil {
		l.close()
	}
	return err
}
