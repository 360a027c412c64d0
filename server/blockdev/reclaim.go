package blockdev

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Reclaim disconnects the devices that processes have left behind which are dead, and returns their indexes. It takes those only whose
// lease nobody holds any more, and that carry the identifier noted there, under the Name of this pool. One that somebody still
// uses, as a mount does, is left alone, and its *nbdnl.BusyError is in the error; the others are reclaimed all the same. To be called
// at the start, and whenever it is worth looking; what is of a living process, of this one too, is never touched. Before Linux 5.14,
// where no device shows whose it is, none is, and the error matches errors.ErrUnsupported.
func (p *Pool) Reclaim(ctx context.Context) ([]int, error) {
	indexes, err := p.machine.system.Leased()
	errs := []error{err}
	var reclaimed []int
	for _, index := range indexes {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		taken, err := p.reclaim(ctx, index)
		if taken {
			reclaimed = append(reclaimed, index)
		}
		errs = append(errs, err)
	}
	return reclaimed, errors.Join(errs...)
}

// reclaim reclaims one index, if there is reason to.
func (p *Pool) reclaim(ctx context.Context, index int) (bool, error) {
	lease, err := p.machine.system.TryLease(index)
	if errors.Is(err, nbdnl.ErrBusy) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	left := lease.Left()
	if left != "" && !strings.HasPrefix(left, p.o.Name+":") {
		return false, lease.Leave()
	}
	if left == "" {
		return false, lease.Release()
	}
	// Its server is dead, so what is cached has nowhere to go.
	err = p.client.Detach(ctx, index, nbdnl.DetachOptions{Identifier: left, Dead: true})
	switch {
	case err == nil:
		return true, lease.Release()
	case missing(err): // It has ended by itself, and the index may be another's by now.
		return false, lease.Release()
	default:
		return false, errors.Join(fmt.Errorf("blockdev: %s was left behind: %w", nbdnl.Path(index), err), lease.Leave())
	}
}
