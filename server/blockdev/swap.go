package blockdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/backends"
)

// Swap puts b in the place of the backend while the device is in use. Every request that was read
// before is executed by the old backend, and what it has acknowledged is durable there; every later
// one is executed by b. When Swap returns nil, nothing uses the old backend any more, and it may be
// closed; b must stay open until Done.
//
// It is for the caller to see that b has the content of the old one: a layer above it, a mirror
// that has caught up, or a copy, for which SwapFunc gives the time. What the kernel holds back is
// not written before, and goes to b; Flush first to have it in the old one.
//
// The size must be the device's, and b must be able to do whatever the kernel was told of at the
// connect (see server.Export.Swap), or the error matches errors.ErrUnsupported. First the old one
// is synced while I/O goes on, until ctx ends at the latest. Then the requests in flight, and
// another sync, may take half of Timeout, or until ctx ends. When either is over, the error says
// so, the old backend stays, and I/O goes on as if nothing had been.
func (d *Device) Swap(ctx context.Context, b backends.Backend) error {
	return d.swap(ctx, func(ctx context.Context) (dev backends.Device, err error) {
		if b == nil {
			return dev, errors.New("blockdev: no backend")
		}
		if dev, err = d.successor(b); err != nil {
			return dev, err
		}
		return dev, d.export.Swap(ctx, b)
	})
}

// SwapFunc is like Swap for the backend that next returns, which may be the old one. It is called
// when the old one has executed all that was read and nothing else is executed, so what it copies
// is consistent. The kernel's requests wait meanwhile, each for Timeout at the most, so next must
// be done within half of that, as its context tells.
func (d *Device) SwapFunc(ctx context.Context, next func(context.Context) (backends.Backend, error)) error {
	return d.swap(ctx, func(ctx context.Context) (dev backends.Device, err error) {
		err = d.export.SwapFunc(ctx, func() (backends.Backend, error) {
			b, err := next(ctx)
			if err == nil && b == nil {
				err = errors.New("blockdev: no backend")
			}
			if err == nil {
				dev, err = d.successor(b)
			}
			return b, err
		})
		return dev, err
	})
}

// swap has the export change its backend.
func (d *Device) swap(ctx context.Context, exchange func(context.Context) (backends.Device, error)) error {
	if err := d.served(); err != nil {
		return err
	}
	if err := d.change(ctx); err != nil {
		return err
	}
	defer d.unchange()
	// I/O goes on meanwhile, so this may take as long as it does.
	if err := d.export.Sync(ctx); err != nil {
		return fmt.Errorf("blockdev: %s keeps its backend: %w", d.Path(), err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.Timeout()/2, errors.New("the backend takes too long"))
	defer cancel()
	dev, err := exchange(ctx)
	if err != nil {
		return fmt.Errorf("blockdev: %s keeps its backend: %w", d.Path(), err)
	}
	d.backend = dev
	return nil
}

// successor returns b with its abilities sorted out, unless the kernel was told of more than it
// has. What the server was told of, the server knows.
func (d *Device) successor(b backends.Backend) (backends.Device, error) {
	dev := backends.Probe(b)
	if lost := d.flags &^ kernelFlags(d.export, dev); lost != 0 {
		return dev, fmt.Errorf("the new backend has no Zero, which the kernel uses on this device: %w",
			errors.ErrUnsupported)
	}
	return dev, nil
}
