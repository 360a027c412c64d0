package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

const (
	// calmPatience is how long those who look at a device when it is added, as udev does, may take
	// to be done.
	calmPatience = 5 * time.Second
	// calmInterval is how often it is asked whether they are.
	calmInterval = 10 * time.Millisecond
	// maxLookedAt is how many new devices may be such that calmPatience is not enough, before no
	// more are made.
	maxLookedAt = 4
	// keepPause lies between attempts to have more indexes ready.
	keepPause = time.Second
)

// A freeIndex is the index of a device that can be connected, and is ready for that.
type freeIndex struct {
	lease       *claim.Lease
	connections int  // that the device had last; 0: not known
	handedOver  bool // it is another process's, and so is the lease
}

// of returns the index as it is at the end of the device that had it; nil: there was none.
func (free freeIndex) of(d *Device) freeIndex {
	free.handedOver = d != nil && d.conns.handedOver()
	return free
}

// Fill returns when the pool has its Warm indexes ready, or as many as there is room for devices.
func (p *Pool) Fill(ctx context.Context) error {
	select { // Two at once would have the kernel make more devices than it takes.
	case p.filling <- struct{}{}:
		defer func() { <-p.filling }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for p.short() {
		lease, err := p.find(ctx)
		if err != nil {
			return err
		}
		if err := p.putBack(freeIndex{lease: lease}); err != nil {
			return err
		}
	}
	return nil
}

// short reports whether there are fewer indexes ready than there should be, and than there is use
// for.
func (p *Pool) short() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.closed && len(p.ready) < min(p.o.Warm, p.o.Max-p.devices)
}

// wake has keep look whether there are enough.
func (p *Pool) wake() {
	select {
	case p.want <- struct{}{}:
	default:
	}
}

// keep keeps indexes ready until the pool is closed.
func (p *Pool) keep() {
	for {
		var again <-chan time.Time
		if err := p.Fill(p.ctx); err != nil && p.ctx.Err() == nil {
			p.o.Logger.Warn("indexes can't be kept ready", "pool", p.o.Name, "err", err)
			if p.o.OnError != nil {
				p.o.OnError(fmt.Errorf("blockdev: pool %s: indexes can't be kept ready: %w", p.o.Name, err))
			}
			again = time.After(keepPause)
		}
		select {
		case <-p.want:
		case <-again:
		case <-p.ctx.Done():
			return
		}
	}
}

// find leases a free index: one of the devices that exist, from where the last search has ended,
// else a new one.
func (p *Pool) find(ctx context.Context) (*claim.Lease, error) {
	indexes, err := p.client.Indexes()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	first, _ := slices.BinarySearch(indexes, p.next)
	p.mu.Unlock()
	for i := range indexes {
		if lease, err := p.lease(ctx, indexes[(first+i)%len(indexes)]); lease != nil || err != nil {
			return lease, err
		}
	}
	beyond := 0
	if len(indexes) > 0 {
		beyond = indexes[len(indexes)-1] + 1
	}
	for index, lookedAt := beyond, 0; ; index++ {
		lease, err := p.lease(ctx, index)
		if errors.Is(err, nbdnl.ErrBusy) && lookedAt < maxLookedAt {
			lookedAt++
			continue
		}
		if lease != nil || err != nil {
			return lease, err
		}
	}
}

// lease leases that index and makes it ready for use, or returns nil when it is not free.
func (p *Pool) lease(ctx context.Context, index int) (*claim.Lease, error) {
	p.mu.Lock()
	ours := p.leased[index]
	p.mu.Unlock()
	if ours {
		return nil, nil
	}
	// The lease of a device that is connected is not taken, not even for a moment: it may have
	// been left behind, and Reclaim, here or in another process, would take it for held.
	if st, err := p.client.Status(ctx, index); err == nil && st.Connected() {
		return nil, nil
	}
	lease, err := p.client.Claims().TryLease(index)
	if errors.Is(err, nbdnl.ErrBusy) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	free, err := p.prepare(ctx, index)
	if free && err == nil {
		p.mu.Lock()
		p.next = index + 1
		p.leased[index] = true
		p.mu.Unlock()
		return lease, nil
	}
	if lease.Left() != "" {
		return nil, errors.Join(err, lease.Leave()) // It is for Reclaim.
	}
	return nil, errors.Join(err, lease.Release())
}

// prepare has everything there that a connect needs, and reports whether the index is free.
func (p *Pool) prepare(ctx context.Context, index int) (bool, error) {
	st, err := p.client.Status(ctx, index)
	added := errors.Is(err, os.ErrNotExist)
	if added {
		if err = p.client.AddIndex(ctx, index); err == nil {
			st, err = p.calm(ctx, index)
		}
	}
	if err != nil || st.State != nbdnl.StateIdle {
		return false, err
	}
	if err := p.machine.node(ctx, index); err != nil {
		return false, err
	}
	// What the kernel keeps from one use of an index to the next need not be set while somebody
	// waits for the device.
	return true, p.machine.tune(index, 0, p.o.Logger)
}

// calm waits until nobody has a new device open any more.
func (p *Pool) calm(ctx context.Context, index int) (nbdnl.Status, error) {
	patient, cancel := context.WithTimeout(ctx, calmPatience)
	defer cancel()
	look := time.NewTicker(calmInterval)
	defer look.Stop()
	for {
		st, err := p.client.Status(ctx, index)
		if err != nil || st.State == nbdnl.StateIdle {
			return st, err
		}
		select {
		case <-look.C:
		case <-patient.Done():
			err := context.Cause(ctx)
			if err == nil {
				holders, _ := p.client.Holders().Find(context.WithoutCancel(ctx), index) // who they are is known or not
				err = &nbdnl.BusyError{Index: index, Holders: holders}
			}
			return st, fmt.Errorf("blockdev: the new device %s is still looked at: %w", nbdnl.Path(index), err)
		}
	}
}
