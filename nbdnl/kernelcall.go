package nbdnl

import (
	"context"
	"fmt"
	"time"
)

// maxCommands bounds the commands of one Client that are in the kernel at a time, and so the threads
// that a stuck kernel takes from the process. Generic netlink runs them one after the other anyway.
const maxCommands = 8

// undoGrace is how long an operation whose context has ended waits for the kernel's answer, in order to
// have undone what it did when it returns.
const undoGrace = 2 * time.Second

// do runs f, which may sleep in the kernel where no signal wakes it, in a goroutine of its own, and
// returns what it returns, or an error when ctx ends first. In that case the goroutine goes on, and
// passes what f returns without an error to undo, if there is one.
//
// slots bounds the goroutines that are under way; it may be nil.
func do[T any](ctx context.Context, slots chan struct{}, f func() (T, error), undo func(T)) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	if slots != nil {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return none, fmt.Errorf("earlier commands are stuck in the kernel: %w", context.Cause(ctx))
		}
	}
	type outcome struct {
		value T
		err   error
	}
	// Unbuffered: f's outcome is either received here or undone by the goroutine, never both or
	// neither.
	answer := make(chan outcome)
	abandoned := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		if slots != nil {
			defer func() { <-slots }()
		}
		value, err := f()
		select {
		case answer <- outcome{value, err}:
		case <-abandoned:
			if err == nil && undo != nil {
				undo(value)
			}
		}
	}()
	select {
	case o := <-answer:
		return o.value, o.err
	case <-ctx.Done():
	}
	close(abandoned)
	if undo != nil {
		grace := time.NewTimer(undoGrace)
		defer grace.Stop()
		select {
		case <-finished:
		case <-grace.C:
		}
	}
	return none, fmt.Errorf("the kernel has not answered yet: %w", context.Cause(ctx))
}
