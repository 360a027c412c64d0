package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// Attach goes on with a device whose server is dead: b takes the place of the backend there, new
// connections that of the dead ones. left is what the kernel shows of the device, as Pool.Left or
// nbdnl.Client.Status return it. What is asked of the device has waited, for DeadTimeout since the
// last connection died; what was in flight the kernel sends again when the timeout of each request
// is up. Whether it has failed writes before is not known, and no Loss.
//
// Options hold as for Connect, but for Identifier, BlockSize and ReadOnly, which are as the device
// is. Its timeouts become those of the options; DeadTimeout is not 0. Connections is how many the
// device was made with; 0: as many as the kernel has queues for it.
//
// Nobody else may serve the device, nor write to what is behind b. Of a server that is merely hung
// the kernel still has a connection: Attach, which returns when all connections are new, waits for
// its end until ctx ends.
//
// What the kernel shows now and what b can do is compared with left first. If it differs, as that
// of another image may, the error has a *MismatchError for each difference, and the device still
// waits for the right one. So it does after any other error. Before Linux 5.14, where no device
// shows whose it is, the error matches errors.ErrUnsupported.
func Attach(ctx context.Context, left nbdnl.Status, b backends.Backend, o Options) (*Device, error) {
	return machine{}.attach(ctx, left, b, o, nil, func() error { return nil })
}

// Attach is the function Attach for a device of this pool that Left has returned, with the pool's
// client; it becomes one of the pool's devices, and waits for a place as Connect does. The error
// matches nbdnl.ErrBusy if another process was quicker, or looks at it in this moment.
func (p *Pool) Attach(ctx context.Context, left nbdnl.Status, b backends.Backend, o Options) (*Device, error) {
	if err := p.enter(ctx); err != nil {
		return nil, err
	}
	lease, err := p.leftAt(left.Index)
	if lease == nil {
		if err == nil {
			err = fmt.Errorf("blockdev: %s is not left behind any more: %w", nbdnl.Path(left.Index), nbdnl.ErrBusy)
		}
		return nil, errors.Join(err, p.leave(freeIndex{}))
	}
	p.mu.Lock()
	p.leased[left.Index] = true
	p.mu.Unlock()
	free := freeIndex{lease: lease}
	if lease.Left() != left.Identifier {
		err := &MismatchError{left.Index, "identifier", left.Identifier, lease.Left()}
		return nil, errors.Join(err, p.leave(free))
	}
	o.Client = p.client
	if o.Logger == nil {
		o.Logger = p.o.Logger
	}
	var dev *Device
	note := func(d *Device) { d.lease, dev = lease, d }
	return p.machine.attach(ctx, left, b, o, note, func() error { return p.leave(free.of(dev)) })
}

// attach is Attach. note is called for the new Device before it is served; nil: nothing is.
func (m machine) attach(
	ctx context.Context, left nbdnl.Status, b backends.Backend, o Options, note func(*Device), giveBack func() error,
) (*Device, error) {
	if !left.HasIdentifier {
		return nil, errors.Join(noIdentifier(left.Index), giveBack())
	}
	if o.DeadTimeout <= 0 {
		err := fmt.Errorf("blockdev: %s is not attached without Options.DeadTimeout: "+
			"the kernel would wait for no connection", nbdnl.Path(left.Index))
		return nil, errors.Join(err, giveBack())
	}
	s := m.existing(left, o)
	s.flags |= nbdnl.FlagCanMultiConn
	d, err := m.adopt(ctx, s, b, o, func(d *Device) error {
		if note != nil {
			note(d)
		}
		u := nbdnl.Update{Timeout: &s.timeout, DeadConnTimeout: &s.deadTimeout}
		return d.client.Reconfigure(ctx, left.Index, left.Identifier, u)
	}, giveBack)
	if err != nil {
		return nil, err
	}
	return d.awaitOrCut(ctx, len(s.links))
}

// awaitOrCut returns the device when all its connections are alive, and so many have been replaced.
// If that does not come, it has ended.
func (d *Device) awaitOrCut(ctx context.Context, replaced int) (*Device, error) {
	if err := d.awaitAlive(ctx, replaced); err != nil {
		d.conns.cut()
		return nil, errors.Join(err, d.await(context.WithoutCancel(ctx)), d.release())
	}
	return d, nil
}

// queues returns how many queues the kernel has for the device, which it makes for each connection,
// up to the number of processors; 0: that does not show.
func (m machine) queues(index int) int {
	entries, err := os.ReadDir(m.path("sys/block", fmt.Sprintf("nbd%d", index), "mq"))
	if err != nil {
		return 0
	}
	return len(entries)
}

// awaitAlive waits until all connections are alive, of which there was none in so many places.
func (d *Device) awaitAlive(ctx context.Context, replaced int) error {
	n := d.Connections()
	for {
		o := d.Outage()
		if o.Alive == n && o.Replaced >= int64(replaced) {
			return nil
		}
		select {
		case <-d.changes:
		case <-d.Done():
			return fmt.Errorf("blockdev: %s has not come back: %w", d.Path(), d.Err())
		case <-ctx.Done():
			err := context.Cause(ctx)
			if o.Err != nil {
				err = fmt.Errorf("%w: %w", err, o.Err)
			}
			return fmt.Errorf("blockdev: %s has %d of %d connections: %w", d.Path(), o.Alive, n, err)
		}
	}
}
