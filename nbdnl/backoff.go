package nbdnl

import (
	"context"
	"time"
)

// A backoff waits between looks at something that gives no sign, each time twice as long, from one
// millisecond to fifty.
type backoff struct {
	next  time.Duration
	timer *time.Timer
}

const (
	minPause = time.Millisecond
	maxPause = 50 * time.Millisecond
)

func newBackoff() *backoff {
	t := time.NewTimer(0)
	t.Stop()
	return &backoff{next: minPause, timer: t}
}

// wait returns after the pause, or when something comes from wake, which makes the next pauses short
// again, or with an error when ctx has ended.
func (b *backoff) wait(ctx context.Context, wake <-chan struct{}) error {
	select {
	case <-b.after():
	case <-wake:
		b.next = minPause
	case <-ctx.Done():
	}
	b.timer.Stop()
	return context.Cause(ctx)
}

// after begins a pause, and returns what tells its end.
func (b *backoff) after() <-chan time.Time {
	b.timer.Reset(b.next)
	b.next = min(2*b.next, maxPause)
	return b.timer.C
}

func (b *backoff) stop() { b.timer.Stop() }
