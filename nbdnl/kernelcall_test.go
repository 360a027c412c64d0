package nbdnl

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestDo(t *testing.T) {
	t.Run("passes on what comes in time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			failure := errors.New("failure")
			late := func(int, error) { t.Error("what came in time is late") }
			if v, err := do(t.Context(), nil, func() (int, error) { return 7, nil }, late); v != 7 || err != nil {
				t.Errorf("got %d, %v", v, err)
			}
			if _, err := do(t.Context(), nil, func() (int, error) { return 0, failure }, late); err != failure {
				t.Errorf("got %v, want %v", err, failure)
			}
		})
	})
	t.Run("leaves behind what does not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cause := errors.New("patience is over")
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
			defer cancel()
			got := make(chan int, 1)
			_, err := do(ctx, nil, func() (int, error) {
				time.Sleep(time.Minute)
				return 7, nil
			}, func(v int, err error) { got <- v })
			if !errors.Is(err, errNoAnswer) || !errors.Is(err, cause) {
				t.Errorf("got %v", err)
			}
			if v := <-got; v != 7 {
				t.Errorf("late value is %d", v)
			}
		})
	})
	t.Run("bounds what is under way", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit := make(chan struct{}, 1)
			stuck := make(chan struct{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			for range 3 {
				if _, err := do(ctx, limit, func() (int, error) { <-stuck; return 0, nil }, nil); err == nil {
					t.Error("a stuck command has ended")
				}
			}
			ran := false
			ctx, cancel = context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := do(ctx, limit, func() (int, error) { ran = true; return 0, nil }, nil); err == nil || ran {
				t.Error("a command ran beside the one that is stuck")
			}
			close(stuck)
			if _, err := do(t.Context(), limit, func() (int, error) { return 0, nil }, nil); err != nil {
				t.Errorf("the limit has no room again: %v", err)
			}
		})
	})
}

// What is late may give a command within the same limit.
func TestDoLateWithinLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := make(chan struct{}, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		undone := make(chan error, 1)
		_, err := do(ctx, limit, func() (int, error) { time.Sleep(time.Minute); return 0, nil }, func(int, error) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_, err := do(ctx, limit, func() (int, error) { return 0, nil }, nil)
			undone <- err
		})
		if !errors.Is(err, errNoAnswer) {
			t.Errorf("got %v", err)
		}
		if err := <-undone; err != nil {
			t.Errorf("undo: %v", err)
		}
	})
}

func TestDelayed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("cause")
		ctx, end := context.WithCancelCause(t.Context())
		later, cancel := delayed(ctx, time.Second)
		defer cancel()
		end(cause)
		begin := time.Now()
		<-later.Done()
		if d := time.Since(begin); d != time.Second || context.Cause(later) != cause {
			t.Errorf("ended after %v, for %v", d, context.Cause(later))
		}
		// Not begun to end: canceling leaves no timer and no goroutine, or the bubble would not
		// end.
		_, cancel = delayed(t.Context(), time.Hour)
		cancel()
	})
}
