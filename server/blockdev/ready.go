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
	err := p.run(ctx, d.conns.done)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errUnending):
		return fmt.Errorf("blockdev: %s: %w", d.Path(), err)
	case errors.Is(err, errUnserved):
		return snatched(d.Path(), d.conns.err)
	case d.gone(ctx): // A device without a connection has no bytes: to read them meets the end of the file.
		return snatched(d.Path(), err)
	}
	// The user of a block device sees nothing but EIO; the backend has said more.
	if d.export != nil {
		if last := d.export.LastError(); last != nil {
			return fmt.Errorf("blockdev: %w (%w)", err, last)
		}
	}
	return fmt.Errorf("blockdev: %w", err)
}

// use opens the device and reads its first block.
func (d *Device) use(ctx context.Context) error { return d.machine.use(ctx, d.index, d.BlockSize()) }

// snatched is the error of a device that somebody else has disconnected before it was ready.
func snatched(path string, err error) error {
	err = errors.Join(nbdnl.ErrNotConnected, err)
	return fmt.Errorf("blockdev: %s was disconnected before it was ready: %w", path, err)
}

var (
	errUnending = errors.New("the first open and read did not come to an end")
	errUnserved = errors.New("the device has ended during the first open and read")
)

// A probe is the first use of a new device. The open makes the kernel scan the partitions, which
// reads from the backend and blocks where neither a context nor a signal reaches: hence a goroutine
// of its own.
type probe struct {
	use      func(context.Context) error
	started  bool
	finished chan struct{} // closed after err is set
	err      error
}

func newProbe(use func(context.Context) error) *probe {
	return &probe{use: use, finished: make(chan struct{})}
}

// run makes the first use, and returns how it went. It does not wait for it after ctx has ended,
// which gives errUnending, nor after unserved is closed, which gives errUnserved. To be called
// once.
func (p *probe) run(ctx context.Context, unserved <-chan struct{}) error {
	p.started = true
	go func() {
		defer close(p.finished)
		p.err = p.use(ctx)
	}()
	select {
	case <-p.finished:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errUnending, context.Cause(ctx))
	case <-unserved:
		return errUnserved
	}
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
