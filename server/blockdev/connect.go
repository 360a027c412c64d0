package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/wire"
)

// anyIndex stands for one of the kernel's choice.
const anyIndex = -1

const (
	// undoPatience bounds the undoing of a connect that failed half-way.
	undoPatience = 10 * time.Second
	// maxAttempts bounds the connects of one device in which the kernel does not receive from all
	// connections.
	maxAttempts = 3
)

// Connect makes b a block device whose index the kernel chooses, and returns when the device can be
// used: the kernel shows what was asked for, the device node is there, the partitions are scanned,
// and the first block can be read. The backend must stay open until Done.
//
// If anything fails, or ctx ends first, everything is undone and nothing is left behind. The error
// matches nbdnl.ErrNoDriver, os.ErrPermission, nbdnl.ErrBusy, errors.ErrUnsupported (a block size
// that this kernel lacks), or is one of the backend.
func Connect(ctx context.Context, b backends.Backend, o Options) (*Device, error) {
	return machine{}.connect(ctx, anyIndex, b, o)
}

// ConnectIndex is like Connect for the device /dev/nbd<index>, which is created if it does not
// exist. If it is in use the error matches nbdnl.ErrBusy; one that somebody merely has open for a
// moment, as udev does, is waited for.
func ConnectIndex(ctx context.Context, index int, b backends.Backend, o Options) (*Device, error) {
	if index < 0 {
		return nil, fmt.Errorf("blockdev: there is no device with index %d", index)
	}
	return machine{}.connect(ctx, index, b, o)
}

func (m machine) connect(ctx context.Context, index int, b backends.Backend, o Options) (*Device, error) {
	device := func() (*Device, error) { return m.newDevice(b, o) }
	return m.establish(ctx, device, placeAt(index), func() error { return nil })
}

// A place has the kernel connect a device somewhere, and returns where.
type place func(context.Context, *Device, nbdnl.Config) (index int, err error)

// establish connects what device makes, where place says. It calls giveBack once, when the device
// has ended or does not come into being.
func (m machine) establish(
	ctx context.Context, device func() (*Device, error), place place, giveBack func() error,
) (*Device, error) {
	if ctx.Err() != nil {
		return nil, errors.Join(context.Cause(ctx), giveBack())
	}
	d, err := m.received(ctx, device, place)
	if err != nil {
		return nil, errors.Join(err, giveBack())
	}
	d.giveBack = giveBack
	probe := newProbe(d.use)
	if err := d.ready(ctx, probe); err != nil {
		return nil, errors.Join(err, d.abandon(ctx, probe), d.release())
	}
	return d, nil
}

// received connects a device all of whose connections the kernel receives from. Where it does not,
// threads were missing (see nbdnl.Client.WaitReceivers), which are there a moment later. A device
// that has always too few is better than none: the kernel gives up the others at their first
// timeout, and they are replaced.
func (m machine) received(ctx context.Context, device func() (*Device, error), place place) (*Device, error) {
	for attempt := 1; ; attempt++ {
		d, err := device()
		if err != nil {
			return nil, err
		}
		if err := d.attach(ctx, place); err != nil {
			return nil, errors.Join(err, d.release())
		}
		n := d.Connections()
		if n == 1 {
			return d, nil
		}
		err = d.client.WaitReceivers(ctx, d.index, n)
		switch {
		case err == nil:
			return d, nil
		case !errors.Is(err, nbdnl.ErrStranded):
			return nil, errors.Join(err, d.drop(ctx, nil), d.release())
		case attempt == maxAttempts:
			d.log.Warn("requests may hang until their timeout", "err", err)
			return d, nil
		}
		d.log.Info("connected again", "err", err)
		if err := errors.Join(d.drop(ctx, nil), d.release()); err != nil {
			return nil, err
		}
	}
}

// newDevice checks what can be checked before anything is touched.
func (m machine) newDevice(b backends.Backend, o Options) (*Device, error) {
	if b == nil {
		return nil, errors.New("blockdev: no backend")
	}
	dev := backends.Probe(b)
	o = o.complete(dev.BlockSizes.Minimum)
	d := m.device(o)
	e, err := o.export(b, d.log)
	if err != nil {
		return nil, err
	}
	d.source, d.backend, d.export = ownSource{d}, dev, e
	d.blockSize, d.flags = e.BlockSize(), kernelFlags(e, dev)
	d.readOnly = e.Flags()&wire.FlagReadOnly != 0
	d.size.Store(e.Size())
	d.bePatient()
	e.OnLoss(d.losses.failed)
	return d, d.open()
}

// device makes a device of completed options, of which it is not said yet what it is for.
func (m machine) device(o Options) *Device {
	path := new(atomic.Pointer[string])
	log := slog.New(label{o.Logger.Handler(), o.Identifier, path})
	d := &Device{
		machine:    m,
		client:     o.Client,
		options:    o,
		log:        log,
		path:       path,
		index:      anyIndex,
		ending:     make(chan struct{}, 1),
		changing:   make(chan struct{}, 1),
		commanding: make(chan struct{}, 1),
		changes:    make(chan struct{}, 1),
		conns:      newConnections(o.Timeout, o.DeadTimeout, log),
	}
	d.conns.renew, d.conns.missed, d.conns.changed = d.renew, d.losses.unsent, d.changed
	d.losses.notify = d.changed
	return d
}

// open gets ready what the device needs for itself.
func (d *Device) open() (err error) {
	if n := runtime.NumCPU(); d.options.Connections > n {
		d.log.Warn("more connections than processors: the kernel sends nothing over the others",
			"connections", d.options.Connections, "processors", n)
	}
	if d.readOnly {
		d.losses.excuse()
	}
	if d.export != nil && d.options.Recoverable {
		if d.ledger, err = newLedger(d.options.Connections); err != nil {
			return err
		}
	}
	if d.client == nil {
		if d.client, err = nbdnl.New(); err != nil {
			return errors.Join(err, d.ledger.close())
		}
		d.ownsClient = true
	}
	return nil
}

// attach makes fresh connections, and hands the kernel its part of them. On error the connections
// are gone.
func (d *Device) attach(ctx context.Context, place place) error {
	made, err := d.source.connect(ctx, d.options.Connections)
	if err != nil {
		return err
	}
	defer made.release()

	// The kernel's first request can come before its answer to the connect: udev opens the device
	// as soon as it appears.
	d.conns.serve(made.conns)
	if err := d.command(ctx, place, made.kernel); err != nil {
		d.conns.cut()
		return errors.Join(err, d.await(context.WithoutCancel(ctx)))
	}
	return nil
}

// transmitters returns what is to serve, or watch, existing connections.
func (d *Device) transmitters(ends []link) ([]transmitter, error) {
	if d.export == nil {
		return d.watch(ends)
	}
	conns := make([]transmitter, len(ends))
	for i, end := range ends {
		nc := end.open()
		conns[i] = d.newServed(nc, end.unread)
	}
	return conns, nil
}

// command has the kernel connect the device.
func (d *Device) command(ctx context.Context, place place, sockets []syscall.Conn) error {
	index, err := place(ctx, d, nbdnl.Config{
		Sockets:         sockets,
		Size:            d.Size(),
		BlockSize:       d.blockSize,
		Flags:           d.flags,
		Timeout:         d.Timeout(),
		DeadConnTimeout: d.DeadTimeout(),
		Identifier:      d.options.Identifier,
	})
	d.index = index
	if err == nil {
		d.isAt(index, d.machine.system.IncarnationOf(index))
	}
	return err
}

// isAt notes which of the kernel's devices this is.
func (d *Device) isAt(index int, incarnation nbdnl.Incarnation) {
	d.index, d.incarnation = index, incarnation
	path := d.Path()
	d.path.Store(&path)
	d.conns.attach()
}

// placeAt is a place for that index, or for one of the kernel's choice.
func placeAt(index int) place {
	return func(ctx context.Context, d *Device, c nbdnl.Config) (int, error) {
		if index == anyIndex {
			return d.client.Connect(ctx, c)
		}
		// Whoever is about to disconnect the index at this moment is done with it once the claim is
		// ours.
		claimed, err := d.client.Claims().Claim(ctx, index)
		if err != nil {
			return index, err
		}
		defer func() {
			if err := claimed.Release(); err != nil {
				d.log.Warn("claim was not released", "device", nbdnl.Path(index), "err", err)
			}
		}()
		return index, d.client.ConnectIndex(ctx, index, c)
	}
}

// abandon takes down a device that did not become ready.
func (d *Device) abandon(ctx context.Context, p *probe) error {
	if p.pending() {
		// The open hangs in the kernel, waiting for the backend, and any other open would queue up
		// behind it.
		return d.drop(ctx, p)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	return d.end(ctx)
}

// drop disconnects a device without opening it, which frees an open that hangs. Nobody has written
// anything that could be lost. p may be nil.
func (d *Device) drop(ctx context.Context, p *probe) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	err := d.client.Drop(ctx, d.index, d.Identifier())
	if errors.Is(err, errors.ErrUnsupported) {
		err = d.client.DropAny(ctx, d.index) // No identifiers here; we have connected it just now.
	}
	switch {
	case d.gone(ctx):
		err = nil
	case err != nil:
		d.conns.cut()
	}
	if p != nil {
		err = errors.Join(err, p.wait(ctx))
	}
	err = errors.Join(err, d.await(ctx))
	if !d.gone(ctx) { // Somebody else has it open: the kernel keeps it for so long.
		err = errors.Join(err, d.client.WaitFree(ctx, d.index))
	}
	return err
}

// release gives back what the device had for itself.
func (d *Device) release() error {
	err := d.ledger.close()
	if d.ownsClient {
		err = errors.Join(err, d.client.Close())
	}
	if d.giveBack != nil {
		err = errors.Join(err, d.giveBack())
	}
	return err
}
