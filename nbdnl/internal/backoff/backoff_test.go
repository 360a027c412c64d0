package backoff_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
)

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := backoff.New()
		defer b.Stop()
		var pauses []time.Duration
		pause := func(wake <-chan struct{}) {
			begin := time.Now()
			if err := b.Wait(t.Context(), wake); err != nil {
				t.Fatal(err)
			}
			pauses = append(pauses, time.Since(begin)/time.Millisecond)
		}
		for range 8 {
			pause(nil)
		}
		woken := make(chan struct{}, 1)
		woken <- struct{}{}
		pause(woken)
		pause(nil)
		b.Reset()
		pause(nil)
		want := []time.Duration{1, 2, 4, 8, 16, 32, 50, 50, 0, 1, 1}
		for i := range want {
			if pauses[i] != want[i] {
				t.Fatalf("pauses of %v ms, want %v", pauses, want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := b.Wait(ctx, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}
