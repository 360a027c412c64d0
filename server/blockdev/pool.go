package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

const (
	// defaultMax is far more than a machine has use for, and far from what the kernel can take.
	defaultMax = 1024
	// placeAttempts is how many indexes are tried before one of them is waited for.
	placeAttempts = 8
)

// PoolOptions say how a Pool works. The zero value is ready to use.
type PoolOptions struct {
	// Name comes first in the identifiers of the pool's devices, before a colon. Reclaim takes what
	// an earlier process has left under the same name, so no other program should use it. Empty:
	// the name of the program.
	Name string
	// Max is how many devices the pool has at a time; who comes then waits, first come first
	// served. 0: 1024.
	Max int
	// Warm is how many free indexes are kept ready, so that a connect finds one whose device
	// exists, whose node is there, and which nobody has open. A new one can take long to come to
	// that: the kernel makes the device, and udev its node, and looks at it. 0: they are looked for
	// when they are needed.
	Warm int
	// Client controls the kernel; it must stay open for as long as the pool and its devices. nil:
	// the pool opens one for itself.
	Client *nbdnl.Client
	// Logger takes why indexes can't be kept ready, and is that of devices which have none of their
	// own. nil: none.
	Logger *slog.Logger
	// OnError takes what the pool's work in the background fails at: why indexes can't be kept
	// ready. It is tried again every second, and told every time. Devices can be connected
	// meanwhile, and have errors of their own. It is called by one goroutine, for which Close
	// waits, so it must not call Close. nil: nothing is called.
	OnError func(error)
}

// A Pool connects devices of which a program has many, one after the other and side by side. Its
// devices share a client, and so the sockets to the kernel. They share nothing else: one that fails
// does not take others with it, and no lock is held while the kernel works. Safe for concurrent
// use.
//
// It leases the indexes that it uses (claim.Lease), so that pools of other processes do not reach
// for them, and so that what a process leaves when it dies is known as such. It never takes an
// index on which another device is still coming to its end, or that anybody has open, and adds
// devices to those that the module has made when all are taken.
type Pool struct {
	machine    machine
	client     *nbdnl.Client
	ownsClient bool
	o          PoolOptions
	places     chan struct{} // holds a value for each device

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	keeper sync.WaitGroup
	want   chan struct{} // holds a value when there may be too few indexes ready
	// filling holds a value while Fill is at work.
	filling chan struct{}

	mu      sync.Mutex   // guards all below
	ready   []freeIndex  // the first was put there first
	leased  map[int]bool // all indexes that the pool has leases of, which need not be asked for
	next    int          // index at which to look for more
	devices int          // that were begun, and have not ended
	waiting int          // in Connect, until a device ends
	// idle is closed as long as there are no devices.
	idle   chan struct{}
	closed bool
}

// NewPool returns a pool, which must be closed. It does not wait for Warm indexes: Fill does. What
// an earlier process has left stays until Reclaim.
func NewPool(o PoolOptions) (*Pool, error) { return machine{}.newPool(o) }

func (m machine) newPool(o PoolOptions) (*Pool, error) {
	if o.Name == "" {
		o.Name = filepath.Base(os.Args[0])
	}
	if o.Max == 0 {
		o.Max = defaultMax
	}
	if o.Max < 0 || o.Warm < 0 || o.Warm > o.Max {
		return nil, fmt.Errorf("blockdev: a pool of %d devices with %d indexes ready: there must be room for both",
			o.Max, o.Warm)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Pool{
		machine: m, client: o.Client, o: o,
		leased: make(map[int]bool),
		places: make(chan struct{}, o.Max), want: make(chan struct{}, 1), filling: make(chan struct{}, 1),
		idle: make(chan struct{}),
	}
	close(p.idle)
	if p.client == nil {
		var err error
		if p.client, err = nbdnl.New(); err != nil {
			return nil, err
		}
		p.ownsClient = true
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if o.Warm > 0 {
		p.keeper.Go(p.keep)
	}
	return p, nil
}

// Connect is the function Connect on an index of the pool's choice, with the pool's client; of what
// Options say the rest holds. While the pool has its Max of devices it waits for one to be closed.
// An index that somebody opens at the last moment, as udev does, is left for another one; when that
// happens again and again, the error is a *nbdnl.BusyError that says who it was.
//
// The device is ended as any other, and the pool gets its index back then.
func (p *Pool) Connect(ctx context.Context, b backends.Backend, o Options) (*Device, error) {
	if err := p.enter(ctx); err != nil {
		return nil, err
	}
	o.Client = p.client
	if o.Identifier == "" {
		o.Identifier = nbdnl.NewIdentifier(p.o.Name)
	}
	if o.Logger == nil {
		o.Logger = p.o.Logger
	}
	var free freeIndex
	var dev *Device
	place := func(ctx context.Context, d *Device, c nbdnl.Config) (index int, err error) {
		if free, err = p.place(ctx, c); err != nil {
			return anyIndex, err
		}
		d.tuned, d.lease, dev = true, free.lease, d
		return free.lease.Index(), nil
	}
	device := func() (*Device, error) { return p.machine.newDevice(b, o) }
	return p.machine.establish(ctx, device, place, func() error { return p.leave(free.of(dev)) })
}

// enter waits for a place for another device.
func (p *Pool) enter(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case p.places <- struct{}{}:
	default:
		if err := p.queue(ctx); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		<-p.places
		return fmt.Errorf("blockdev: pool %s: %w", p.o.Name, os.ErrClosed)
	}
	if p.devices == 0 {
		p.idle = make(chan struct{})
	}
	p.devices++
	return nil
}

// queue waits for a place until a device gives its own back.
func (p *Pool) queue(ctx context.Context) error {
	count := func(n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.waiting += n
	}
	count(1)
	defer count(-1)
	select {
	case p.places <- struct{}{}:
		return nil
	case <-p.ctx.Done():
		return fmt.Errorf("blockdev: pool %s: %w", p.o.Name, os.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("blockdev: pool %s has all of its %d devices in use: %w",
			p.o.Name, p.o.Max, context.Cause(ctx))
	}
}

// leave gives back a place, and the index if there was one.
func (p *Pool) leave(free freeIndex) error {
	var err error
	if free.lease != nil {
		err = p.putBack(free)
	}
	<-p.places
	p.mu.Lock()
	defer p.mu.Unlock()
	p.devices--
	p.wake()
	if p.devices == 0 {
		defer close(p.idle)
	}
	return errors.Join(err, p.closeClient())
}

// place connects a device on a free index.
func (p *Pool) place(ctx context.Context, c nbdnl.Config) (freeIndex, error) {
	for attempt := 1; ; attempt++ {
		free, err := p.take(ctx, len(c.Sockets))
		if err != nil {
			return freeIndex{}, err
		}
		// No claim is needed: nobody is at work on an index that is free and leased.
		connect := p.client.TryConnectIndex
		if attempt == placeAttempts {
			connect = p.client.ConnectIndex // which waits, and says for whom
		}
		if err = free.lease.Note(c.Identifier); err == nil {
			err = connect(ctx, free.lease.Index(), c)
		}
		if err == nil {
			return free, nil
		}
		if !errors.Is(err, nbdnl.ErrBusy) {
			return freeIndex{}, errors.Join(err, p.putBack(free))
		}
		// It may stay so for long.
		if err = errors.Join(err, p.release(free.lease)); attempt == placeAttempts {
			return freeIndex{}, err
		}
		p.o.Logger.Debug("index is not free after all", "device", nbdnl.Path(free.lease.Index()), "err", err)
	}
}

// take returns a free index for so many connections. The kernel is quicker where there were as many
// before, for it need not change its queues (blk_mq_update_nr_hw_queues). Of these, and of the
// others, it is the one that has been ready for longest, so that those who look at a device after
// its end have gone.
func (p *Pool) take(ctx context.Context, connections int) (freeIndex, error) {
	p.mu.Lock()
	if len(p.ready) > 0 {
		i := max(0, slices.IndexFunc(p.ready, func(free freeIndex) bool { return free.connections == connections }))
		free := p.ready[i]
		p.ready = slices.Delete(p.ready, i, i+1)
		p.mu.Unlock()
		p.wake()
		free.connections = connections
		return free, nil
	}
	p.mu.Unlock()
	lease, err := p.find(ctx)
	return freeIndex{lease: lease, connections: connections}, err
}

// putBack keeps an index ready, if it is free and needed.
func (p *Pool) putBack(free freeIndex) error {
	if free.handedOver || p.machine.system.IncarnationOf(free.lease.Index()) != 0 {
		// The device is held by somebody, or could not be disconnected. Should it stay for good, it
		// is for Reclaim.
		return p.drop(free.lease, free.lease.Leave)
	}
	p.mu.Lock()
	if !p.closed && len(p.ready) < p.o.Warm {
		p.ready = append(p.ready, free)
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	return p.release(free.lease)
}

// release gives up a lease.
func (p *Pool) release(lease *claim.Lease) error { return p.drop(lease, lease.Release) }

// drop forgets a lease that is given up by that function.
func (p *Pool) drop(lease *claim.Lease, giveUp func() error) error {
	err := giveUp()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.leased, lease.Index())
	return err
}

// Close gives the pool's free indexes back. Devices that live are not touched, and are still to be
// ended, which Wait waits for; who waits in Connect gets an error that matches os.ErrClosed.
func (p *Pool) Close() error {
	p.cancel()
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	ready := p.ready
	p.ready = nil
	p.mu.Unlock()
	p.keeper.Wait()
	var errs []error
	for _, free := range ready {
		errs = append(errs, p.release(free.lease))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(append(errs, p.closeClient())...)
}

// closeClient closes the client after the pool and all devices. It is called with the lock held.
func (p *Pool) closeClient() error {
	if !p.ownsClient || !p.closed || p.devices > 0 {
		return nil
	}
	p.ownsClient = false
	return p.client.Close()
}
