package main

import (
	"context"
	"time"
)

// countAllocations runs a load and counts in the middle of it, when connections have all they need.
func (c *contest) countAllocations(ctx context.Context, p *process, l load) (sample, error) {
	const settle = 300 * time.Millisecond
	type outcome struct {
		sample
		err error
	}
	done := make(chan outcome, 1)
	during := c.client
	during.warm, during.timed = settle, c.timed+settle
	go func() {
		s, err := during.runOnce(ctx, p, l)
		done <- outcome{s, err}
	}()
	n, elapsed, err := c.allocated(p, settle)
	o := <-done
	if o.err != nil {
		return o.sample, o.err
	}
	o.Allocations = n / (o.IOPS * elapsed.Seconds())
	return o.sample, err
}

// allocated counts for a while, after another while.
func (c *contest) allocated(p *process, settle time.Duration) (float64, time.Duration, error) {
	time.Sleep(settle) // The load is the same all the time; this only picks a part of it.
	began := time.Now()
	before, err := p.allocations()
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(c.timed)
	after, err := p.allocations()
	return after - before, time.Since(began), err
}
