package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// maxCommands bounds the commands of one Client that are in the kernel at a time, and so the
// threads that a stuck kernel takes from the process. Generic netlink runs them one after the other
// anyway.
const maxCommands = 8

// errNoAnswer means that a call was left behind in the kernel.
var errNoAnswer = errors.New("the kernel has not answered yet")

// do runs f, which may sleep in the kernel where no signal wakes it, in a goroutine of its own, and
// returns what it returns. When ctx ends first the error matches errNoAnswer, the goroutine goes
// on, and passes what f returns in the end to late, if there is one.
//
// limit has room for as many goroutines as may be under way; nil is no limit.
func do[T any](ctx context.Context, limit chan struct{}, f func() (T, error), late func(T, error)) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	if limit != nil {
		select {
		case limit <- struct{}{}:
		case <-ctx.Done():
			return none, fmt.Errorf("earlier commands are stuck in the kernel: %w", context.Cause(ctx))
		}
	}
	type outcome struct {
		value T
		err   error
	}
	// Unbuffered: the outcome is either received here or passed to late, never both or neither.
	answer := make(chan outcome)
	abandoned := make(chan struct{})
	go func() {
		value, err := f()
		if limit != nil {
			<-limit // before late, which may give a command
		}
		select {
		case answer <- outcome{value, err}:
		case <-abandoned:
			if late != nil {
				late(value, err)
			}
		}
	}()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-ctx.Done():
		close(abandoned)
		return none, fmt.Errorf("%w: %w", errNoAnswer, context.Cause(ctx))
	}
}

// delayed returns a context that ends some time after ctx does, for the same cause.
func delayed(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	later, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(d, func() { cancel(context.Cause(ctx)) })
		context.AfterFunc(later, func() { timer.Stop() })
	})
	return later, func() {
		stop()
		cancel(context.Canceled)
	}
}
