package blockdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// ready returns when the device can be used. That it is what was asked for package nbdnl has seen
// to.
func (d *Device) ready(ctx context.Context, p *probe) error {
	if maximum := d.backend.BlockSizes.Maximum; !d.tuned || maximum > 0 {
		if err := d.machine.tune(d.index, maximum, d.options.Logger); err != nil {
			return err
		}
	}
	if d.options.Unopened {
		return nil
	}
	return d.open(ctx, p)
}

// open opens the device and reads its first block.
func (d *Device) open(ctx context.Context, p *probe) error {
	p.start(ctx)
	select {
	case <-p.finished:
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s: the first open and read did not come to an end: %w", d.Path(), context.Cause(ctx))
	case <-d.done:
		return d.snatched(d.err)
	}
	if p.err == nil {
		return nil
	}
	if d.gone(ctx) { // A device without a connection has no bytes: to read them meets the end of the file.
		return d.snatched(p.err)
	}
	// The user of a block device sees nothing but EIO; the backend has said more.
	if last := d.export.LastError(); last != nil {
		return fmt.Errorf("blockdev: %w (%w)", p.err, last)
	}
	return fmt.Errorf("blockdev: %w", p.err)
}

// snatched is the error of a device that somebody else has disconnected before it was ready.
func (d *Device) snatched(err error) error {
	return fmt.Errorf("blockdev: %s was disconnected before it was ready: %w", d.Path(), errors.Join(nbdnl.ErrNotConnected, err))
}

// A probe is the first use of a new device. The open makes the kernel scan the partitions, which
// reads from the backend and blocks where neither a context nor a signal reaches: hence a goroutine
// of its own.
type probe struct {
	use      func(context.Context) error
	started  bool
	finished chan struct{} // closed after err is set
	err      error
}

func (d *Device) newProbe() *probe {
	return &probe{
		use:      func(ctx context.Context) error { return d.machine.use(ctx, d.index, d.BlockSize()) },
		finished: make(chan struct{}),
	}
}

func (p *probe) start(ctx context.Context) {
	p.started = true
	go func() {
		defer close(p.finished)
		p.err = p.use(ctx)
	}()
}

// pending reports whether the use has begun and not ended.
func (p *probe) pending() bool {
	select {
	case <-p.finished:
		return false
	default:
		return p.started
	}
}

// wait returns when the use has ended, however it did.
func (p *probe) wait(ctx context.Context) error {
	select {
	case <-p.finished:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("blockdev: the kernel does not return from the first open: %w", context.Cause(ctx))
	}
}
