package blockdev

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// An Update says what Reconfigure changes: a nil field leaves that setting as it is. Units and
// ranges are those of Options.
type Update struct {
	// Timeout must not be 0. It holds for the requests and connections that come after.
	Timeout     *time.Duration
	DeadTimeout *time.Duration
}

// Reconfigure changes timeouts of the device while it is in use. The error matches
// nbdnl.ErrNotConnected if the device has ended. If ctx ends first, whether the kernel has made the
// change is not known; calling again settles that.
func (d *Device) Reconfigure(ctx context.Context, u Update) error {
	if u.Timeout != nil && *u.Timeout <= 0 {
		return fmt.Errorf("blockdev: timeout %v: without a positive one a stuck request would never end", *u.Timeout)
	}
	if err := d.change(ctx); err != nil {
		return err
	}
	defer d.unchange()
	return d.reconfigure(ctx, nbdnl.Update{Timeout: u.Timeout, DeadConnTimeout: u.DeadTimeout})
}

// reconfigure gives the kernel one command at a time, so that of two timeouts the later one stays.
func (d *Device) reconfigure(ctx context.Context, u nbdnl.Update) error {
	select {
	case d.commanding <- struct{}{}:
		defer func() { <-d.commanding }()
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s: the kernel has not finished another change: %w", d.Path(), context.Cause(ctx))
	}
	if d.unseen != nil && len(u.Sockets) > 0 {
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, unseenPatience)
		defer cancel()
	}
	if err := d.client.Reconfigure(ctx, d.index, d.Identifier(), u); err != nil {
		return err
	}
	d.conns.setTimeouts(u.Timeout, u.DeadConnTimeout)
	d.bePatient()
	d.changed()
	return nil
}

// change begins a change of the device's settings, of which there is one at a time.
func (d *Device) change(ctx context.Context) error {
	select {
	case d.changing <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s is being changed by another call: %w", d.Path(), context.Cause(ctx))
	}
	select {
	case <-d.conns.done:
		d.unchange()
		return fmt.Errorf("blockdev: %s has ended: %w", d.Path(), errors.Join(nbdnl.ErrNotConnected, d.conns.err))
	default:
		return nil
	}
}

func (d *Device) unchange() { <-d.changing }
