package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

const (
	// closePatience bounds Close.
	closePatience = 30 * time.Second
	// hangPatience is how long the kernel may take for a forced disconnect, whose bounded steps
	// before it included. Then the connections are cut: a kernel that cannot send its NBD_CMD_DISC,
	// because the server has stopped reading, goes on at that.
	hangPatience = 15 * time.Second
)

// Disconnect ends the device in good order: it makes sure that nobody uses it, writes what is
// cached, disconnects, and waits until the index is free and no request is served any more. If
// somebody uses the device, the error is a *nbdnl.BusyError that says who, and the device goes on;
// so it does after any other error before the disconnect. A device that has gone already, by
// whomever's doing, is no error.
//
// What the backend does not take when it is written now ends the device all the same, for the
// kernel has dropped it: the error then matches nbdnl.ErrNotWritten. What was lost earlier is in
// the error, too, of the Disconnect that ends the device, unless it was acknowledged (see Flush).
// Nil means that all that was written to the device is in the backend. Once the device has ended,
// Disconnect and Close do nothing, and say again what the call said that has ended it.
func (d *Device) Disconnect(ctx context.Context) error {
	select {
	case d.ending <- struct{}{}:
		defer func() { <-d.ending }()
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s is being ended by another call: %w", d.Path(), context.Cause(ctx))
	}
	if d.ended {
		return d.result()
	}
	if !d.conns.disconnected() {
		lost := d.detach(ctx, false)
		if lost != nil && !(errors.Is(lost, nbdnl.ErrNotWritten) && d.gone(ctx)) {
			return lost
		}
		d.outcome.add(lost)
	}
	d.conns.retire()
	if err := d.await(ctx); err != nil {
		return errors.Join(err, d.outcome.err)
	}
	d.ended = true
	d.outcome.add(d.release())
	return d.result()
}

// result returns how the device has ended, the same each time. The caller holds ending.
func (d *Device) result() error { return d.outcome.with(d.losses.told(d.index, false)) }

// An outcome is how a device has ended. The zero value says that there is nothing to say.
type outcome struct {
	err  error
	loss *LossError // that told includes
	told error
}

// add adds what has gone wrong.
func (o *outcome) add(err error) {
	if err != nil {
		o.err = errors.Join(o.err, err)
		o.told = nil
	}
}

// with returns the outcome and a loss: the same value as the last time, unless either has changed.
func (o *outcome) with(loss *LossError) error {
	switch {
	case loss == nil:
		return o.err
	case o.told == nil || o.loss != loss:
		o.loss, o.told = loss, errors.Join(o.err, loss)
	}
	return o.told
}

// Close is CloseContext without a context: it returns after 30 seconds at the latest.
func (d *Device) Close() error { return d.CloseContext(context.Background()) }

// CloseContext ends the device even if somebody uses it, who gets I/O errors from then on. What is
// cached is written first, if the backend takes it within a few seconds. CloseContext returns when
// the index is free and no request is served any more; when ctx ends, or after 30 seconds, it cuts
// the connections and returns even if the backend never does. One that knows contexts
// (backends.ReaderAtContext) is told to give up as soon as the kernel has let go of the device. The
// error says what is left, and what was lost, now or earlier, unless that was acknowledged (see
// Flush). A device that has gone already is no error. Further calls do nothing, and say the same
// again.
func (d *Device) CloseContext(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closePatience)
	defer cancel()
	select {
	case d.ending <- struct{}{}:
		defer func() { <-d.ending }()
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s is being ended by another call: %w", d.Path(), context.Cause(ctx))
	}
	if d.ended {
		return d.result()
	}
	d.ended = true
	d.outcome.add(d.end(ctx))
	d.outcome.add(d.release())
	return d.result()
}

// end disconnects the device by force and ends its connections.
func (d *Device) end(ctx context.Context) error {
	hung := time.AfterFunc(hangPatience, d.conns.cut)
	defer hung.Stop()
	defer context.AfterFunc(ctx, d.conns.cut)()
	var err error
	if !d.conns.disconnected() {
		err = d.detach(ctx, true)
	}
	d.conns.retire()
	if err != nil && !d.gone(ctx) {
		d.conns.cut() // It is no device any more, even if the kernel keeps it.
	}
	if late := d.await(ctx); late != nil {
		d.conns.cut()
		err = errors.Join(err, late)
	}
	return err
}

// detach has the kernel disconnect the device. That it has gone already is no error.
func (d *Device) detach(ctx context.Context, force bool) error {
	o := nbdnl.DetachOptions{Identifier: d.Identifier(), Force: force, Dead: d.conns.unserved()}
	err := d.client.Detach(ctx, d.index, o)
	if errors.Is(err, errors.ErrUnsupported) && d.machine.same(d.index, d.incarnation) {
		// This kernel keeps no identifiers, but this is the device that was made for us.
		o.Identifier, o.Any = "", true
		err = d.client.Detach(ctx, d.index, o)
	}
	if (missing(err) || errors.Is(err, errors.ErrUnsupported)) && d.gone(ctx) {
		return nil
	}
	if err == nil && !o.Force && !o.Dead {
		d.losses.excuse()
	}
	if err == nil && d.export == nil {
		d.conns.leave()
	}
	return err
}

// gone reports whether the kernel's device is not connected, or is another by now.
func (d *Device) gone(ctx context.Context) bool {
	st, err := d.client.Status(ctx, d.index)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	if st.Connected() && !st.HasIdentifier && d.incarnation != 0 {
		return !d.machine.same(d.index, d.incarnation)
	}
	return !st.Connected() || st.HasIdentifier && st.Identifier != d.Identifier()
}

// await waits until nothing is served any more.
func (d *Device) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closePatience)
	defer cancel()
	select {
	case <-d.conns.done:
		return nil
	case <-ctx.Done():
		if d.export == nil {
			return fmt.Errorf("blockdev: %s: the kernel has not let go of its connections: %w",
				d.Path(), context.Cause(ctx))
		}
		return fmt.Errorf("blockdev: %s: %d requests are still in the backend: %w",
			d.Path(), d.export.Stats().InFlight, context.Cause(ctx))
	}
}
