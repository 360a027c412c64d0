package host

import (
	"context"
	"errors"
	"os"
	"time"
)

// errLocked says that another process holds the lock.
var errLocked = errors.New("locked by another process")

// retry calls take until it does not answer errLocked, or ctx ends. No lock call
// both waits and heeds a context, so retry asks again, ever more seldom: the wait
// is over within 50 ms of the fact.
func retry(ctx context.Context, take func() (*os.File, error)) (*os.File, error) {
	const longest = 50 * time.Millisecond
	pause := time.Millisecond
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		f, err := take()
		if !errors.Is(err, errLocked) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-timer.C:
			pause = min(2*pause, longest)
			timer.Reset(pause)
		}
	}
}
