package blockdev

import (
	"context"
	"fmt"
)

// PoolStats say what a pool is doing at one moment.
type PoolStats struct {
	// Ready is how many free indexes are kept ready, of PoolOptions.Warm.
	Ready int
	// InUse is how many devices are connected, about to be, or not ended yet, of PoolOptions.Max.
	// One that the kernel has lost is in use until it is closed.
	InUse int
	// Waiting is how many calls of Connect wait for one of these to end.
	Waiting int
}

// Stats returns what the pool is doing. It does not block, and may be called after Close.
func (p *Pool) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return PoolStats{Ready: len(p.ready), InUse: p.devices, Waiting: p.waiting}
}

// Wait returns when no device of the pool is in use: when the last one has been ended, by whoever
// has it, and its index and, after Close, the pool's client are given up. Without a Close before
// there may be new ones by then. If ctx ends first, the error says how many are left.
func (p *Pool) Wait(ctx context.Context) error {
	p.mu.Lock()
	idle := p.idle
	p.mu.Unlock()
	select {
	case <-idle:
		return nil
	default:
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("blockdev: pool %s has %d devices in use: %w", p.o.Name, p.Stats().InUse, context.Cause(ctx))
	}
}
