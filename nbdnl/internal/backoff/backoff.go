// Package backoff waits between looks at something that gives no sign.
package backoff

import (
	"context"
	"time"
)

// A Backoff waits between looks at something that gives no sign, each time twice as long, from one
// millisecond to fifty.
type Backoff struct {
	next  time.Duration
	timer *time.Timer
}

const (
	minPause = time.Millisecond
	maxPause = 50 * time.Millisecond
)

// New returns a Backoff whose next pause is the shortest one.
func New() *Backoff {
	t := time.NewTimer(0)
	t.Stop()
	return &Backoff{next: minPause, timer: t}
}

// Wait returns after the pause, or when something comes from wake, which makes the next pauses
// short again, or with an error when ctx has ended.
func (b *Backoff) Wait(ctx context.Context, wake <-chan struct{}) error {
	select {
	case <-b.After():
	case <-wake:
		b.next = minPause
	case <-ctx.Done():
	}
	b.timer.Stop()
	return context.Cause(ctx)
}

// After begins a pause, and returns what tells its end.
func (b *Backoff) After() <-chan time.Time {
	b.timer.Reset(b.next)
	b.next = min(2*b.next, maxPause)
	return b.timer.C
}

// Reset makes the next pauses short again.
func (b *Backoff) Reset() { b.next = minPause }

// Stop ends the present pause.
func (b *Backoff) Stop() { b.timer.Stop() }
