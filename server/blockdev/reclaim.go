package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// reclaimers bounds how many devices Reclaim ends at a time. Each may keep a thread in the kernel.
// Those that are under way share the look at all processes (nbdnl.Client.Holders), so that it takes
// the fewer of these, the more they are.
const reclaimers = 256

// Reclaim disconnects the devices that processes have left behind which are dead, and returns their
// indexes, ascending. It takes those only whose lease nobody holds any more, and that carry the
// identifier noted there, under the Name of this pool. One that somebody still uses, as a mount
// does, stays, and its *nbdnl.BusyError is in the error; the others are reclaimed all the same,
// many at a time. To be called at the start, and whenever it is worth looking; what is of a living
// process, of this one too, is never touched. Before Linux 5.14, where no device shows whose it is,
// none is, and the error matches errors.ErrUnsupported.
//
// Left tells which devices it would take.
func (p *Pool) Reclaim(ctx context.Context) ([]int, error) {
	indexes, err := p.client.Claims().Leased()
	if err != nil {
		return nil, err
	}
	var (
		mu        sync.Mutex // guards reclaimed
		reclaimed []int
		all       sync.WaitGroup
		places    = make(chan struct{}, reclaimers)
		errs      = make([]error, len(indexes))
	)
	for i, index := range indexes {
		places <- struct{}{}
		if ctx.Err() != nil {
			errs[i] = context.Cause(ctx)
			break
		}
		all.Go(func() {
			defer func() { <-places }()
			taken, err := p.reclaim(ctx, index)
			errs[i] = err
			if taken {
				mu.Lock()
				defer mu.Unlock()
				reclaimed = append(reclaimed, index)
			}
		})
	}
	all.Wait()
	slices.Sort(reclaimed)
	return reclaimed, errors.Join(errs...)
}

// reclaim reclaims one index, if there is reason to.
func (p *Pool) reclaim(ctx context.Context, index int) (bool, error) {
	lease, err := p.leftAt(index)
	if lease == nil {
		return false, err
	}
	// Its server is dead, so what is cached has nowhere to go.
	err = p.client.Detach(ctx, index, nbdnl.DetachOptions{Identifier: lease.Left(), Dead: true})
	switch {
	case err == nil:
		return true, lease.Release()
	case missing(err): // It has ended by itself, and the index may be another's by now.
		return false, lease.Release()
	default:
		return false, errors.Join(leftBehind(index, err), lease.Leave())
	}
}

// Left returns the devices that Reclaim would take, by ascending index, and leaves them as they
// are: for a program that was killed to find out what it had, by the identifiers that it gave, and
// perhaps to serve it anew instead of clearing it away. They are orphaned: there is nobody to
// answer what is asked of them, and what waits for an answer fails in the end, if DeadTimeout was
// set later than else. Who uses them holder.FindAll tells. Attach goes on with one of them.
// Leases are given up whose device has gone.
//
// The device of a process that dies at this moment may be missing, or be one that was in the middle
// of a connect or an end.
func (p *Pool) Left(ctx context.Context) ([]nbdnl.Status, error) {
	indexes, err := p.client.Claims().Leased()
	if err != nil {
		return nil, err
	}
	var left []nbdnl.Status
	var errs []error
	for _, index := range indexes {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		s, ok, err := p.left(ctx, index)
		if ok {
			left = append(left, s)
		}
		errs = append(errs, err)
	}
	return left, errors.Join(errs...)
}

// left returns the device of one index, if it was left behind.
func (p *Pool) left(ctx context.Context, index int) (s nbdnl.Status, ok bool, err error) {
	lease, err := p.leftAt(index)
	if lease == nil {
		return s, false, err
	}
	end := lease.Leave
	defer func() { err = errors.Join(err, end()) }()
	s, err = p.client.Status(ctx, index)
	switch {
	case missing(err) || err == nil && !s.Connected():
		end = lease.Release // Nothing is left but the lease.
		return s, false, nil
	case err != nil:
		return s, false, leftBehind(index, err)
	case s.Mode == nbdnl.ModeUnknown:
		err = fmt.Errorf("this kernel keeps no identifiers, and it may be another's: %w", errors.ErrUnsupported)
		return s, false, leftBehind(index, err)
	}
	s.State = nbdnl.StateOrphaned
	return s, s.HasIdentifier && s.Identifier == lease.Left(), nil
}

// leftAt takes the lease of an index whose holder has died and was of a pool with this name; else
// it returns nil.
func (p *Pool) leftAt(index int) (*claim.Lease, error) {
	lease, err := p.client.Claims().TryLease(index)
	switch {
	case errors.Is(err, nbdnl.ErrBusy):
		return nil, nil
	case err != nil:
		return nil, err
	case lease.Left() == "": // It was given up in order meanwhile.
		return nil, lease.Release()
	case !strings.HasPrefix(lease.Left(), p.o.Name+":"):
		return nil, lease.Leave()
	}
	return lease, nil
}

func leftBehind(index int, err error) error {
	return fmt.Errorf("blockdev: %s was left behind: %w", nbdnl.Path(index), err)
}
