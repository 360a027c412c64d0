package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A Change says what a live device is to become; what is nil stays.
type Change struct {
	// Size in bytes.
	Size *int64 `json:"size,omitempty"`
	// From is the size in bytes that Size was reckoned from, nil if Size was given
	// as such. The device must still have that size.
	From *int64 `json:"from,omitempty"`
	// Force cuts off the end of a device although somebody holds it.
	Force bool `json:"force,omitempty"`
	// Timeout and DeadTimeout are those of connect, in nanoseconds.
	Timeout     *time.Duration `json:"timeout,omitempty"`
	DeadTimeout *time.Duration `json:"dead_timeout,omitempty"`
}

// answerOn serves the control protocol on l.
func (h *Host) answerOn(l net.Listener, device *blockdev.Device) {
	h.changing = make(chan struct{}, 1)
	h.control = newControl(l, func(ctx context.Context, req request) (*Status, error) {
		if req.Op == opHandOver {
			return nil, h.redactor.Error(h.handOver(ctx, device, req.File))
		}
		s, err := h.answer(ctx, device, req)
		if handedOver(device) {
			return nil, ErrMoved
		}
		return s, h.redactor.Error(err)
	})
}

// answer serves the control protocol.
func (h *Host) answer(ctx context.Context, device *blockdev.Device, req request) (*Status, error) {
	switch req.Op {
	case opStatus:
	case opStats:
		s := h.status(device)
		s.Stats = device.Stats()
		if h.remote.direct() {
			return nil, exit.With(exit.Unsupported, "%s: the kernel speaks with the server itself, and has the counts "+
				"(/sys/block/%[1]s/stat, iostat); connect with -o way=relay to have them here", h.record.Device())
		}
		return s, nil
	case opLoss:
		s := h.status(device)
		if loss := device.Loss(); loss != nil {
			s.Loss = h.redactor.Text(loss.Error())
		}
		return s, nil
	case opChange:
		if req.Change == nil {
			return nil, exit.Usagef("a change of nothing")
		}
		changed, err := h.beginChange(ctx)
		if err != nil {
			return nil, err
		}
		err = h.change(ctx, device, *req.Change)
		changed()
		if err != nil {
			h.log.Warn("not changed", "reason", err)
			return nil, err
		}
	case opKick:
		h.log.Warn("kicked: disconnecting although requests wait")
		err := device.Kick(ctx)
		if h.remote != nil && h.remote.GiveUp != nil {
			h.remote.GiveUp()
		}
		return nil, err
	default:
		return nil, exit.With(exit.Unsupported, "%w %q", errUnknownOp, req.Op)
	}
	return h.status(device), nil
}

// beginChange waits until no other change is made. One at a time is, for a size may have been
// reckoned from the present one.
func (h *Host) beginChange(ctx context.Context) (changed func(), err error) {
	select {
	case h.changing <- struct{}{}:
		return func() { <-h.changing }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another change is not done: %w", context.Cause(ctx))
	}
}

// change makes the change. It may ask for several things; what was done before an
// error stays done.
func (h *Host) change(ctx context.Context, device *blockdev.Device, c Change) error {
	if (c.Timeout != nil || c.DeadTimeout != nil) && h.remote != nil && !h.remote.direct() {
		return exit.With(exit.Unsupported, "%s: the timeouts of a relay to another server are those of connect",
			h.record.Device())
	}
	if c.Timeout != nil || c.DeadTimeout != nil {
		if err := device.Reconfigure(ctx, blockdev.Update{Timeout: c.Timeout, DeadTimeout: c.DeadTimeout}); err != nil {
			return err
		}
		h.log.Info("reconfigured", "timeout", device.Timeout(), "dead-timeout", device.DeadTimeout())
	}
	if c.Size != nil {
		was := device.Size()
		if c.From != nil && *c.From != was {
			return exit.With(exit.Busy,
				"not resized: somebody else has done so meanwhile, from %d bytes to %d; try again",
				*c.From, was)
		}
		resize := device.Resize
		if c.Force {
			resize = device.ForceResize
		}
		err := resize(ctx, *c.Size)
		var busy *nbdnl.BusyError
		if errors.As(err, &busy) {
			return fmt.Errorf("not made shorter: %w; unmount or close it, or use --force", busy)
		}
		if err != nil {
			return err
		}
		h.log.Info("resized", "from", was, "to", *c.Size)
	}
	return h.note(device)
}

// phases are those of a device that is served, by its state. With all
// connections dead for good, it is about to be disconnected.
var phases = map[nbdnl.State]Phase{
	nbdnl.StateLive:          PhaseLive,
	nbdnl.StateDegraded:      PhaseDegraded,
	nbdnl.StateWaiting:       PhaseWaiting,
	nbdnl.StateDisconnecting: PhaseDisconnecting,
	nbdnl.StateOrphaned:      PhaseDisconnecting,
}

// note puts into the record what has changed of the device.
func (h *Host) note(device *blockdev.Device) error {
	return h.update(func(r *Record) {
		r.Serving = device.Alive()
		r.Remote = h.remote.state(device)
		if p, ok := phases[device.State()]; ok {
			r.Phase = r.Remote.phase(p)
		}
		r.Size = device.Size()
		if h.remote == nil || h.remote.direct() { // Else they are those of connect.
			r.Spec.Timeout, r.Spec.DeadTimeout = device.Timeout(), device.DeadTimeout()
		}
		if r.Loss == nil {
			r.Loss = lossOf(device.Loss(), h.redactor)
		}
	})
}

// noteRemote puts into record and log that a connection to a backend elsewhere was lost or
// replaced.
func (h *Host) noteRemote(device *blockdev.Device) {
	if err := h.note(device); err != nil {
		h.log.Warn("a change could not be noted", "reason", err)
	}
	switch s := h.remote.state(device); {
	case s.Error != nil:
		h.log.Warn("connections to the server were lost", "alive", s.Alive, "error", *s.Error)
	default:
		h.log.Info("connected to the server again", "alive", s.Alive, "replaced", s.Replaced)
	}
}

// lossOf is what the record says of a device's loss: the first of it, which stays so.
func lossOf(err error, redact *secret.Redactor) *Loss {
	var lost *server.LossError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &lost):
		return &Loss{Time: lost.First.Time, Error: redact.Text(lost.First.Error())}
	}
	return &Loss{Time: time.Now(), Error: redact.Text(err.Error())}
}

// status is what the process tells of itself.
func (h *Host) status(device *blockdev.Device) *Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &Status{Record: h.record}
	s.Record.Remote = h.remote.state(device)
	if h.remote.direct() {
		return s
	}
	s.Connections = trafficOf(device.Stats())
	if e := device.Export().LastError(); e != nil {
		s.LastError = &Failure{
			Op:     e.Op.String(),
			Offset: e.Offset,
			Length: uint64(e.Length),
			Error:  h.redactor.Text(e.Err.Error()),
			Time:   e.Time,
		}
	}
	return s
}

// update changes the record, for lists too.
func (h *Host) update(change func(*Record)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.record)
	if h.frozen {
		return nil
	}
	if err := h.record.write(h.state.path); err != nil {
		return fmt.Errorf("lists show what was before: %w", err)
	}
	return nil
}
