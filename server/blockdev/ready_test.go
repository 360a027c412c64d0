package blockdev

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// TestProbe holds how the first use of a device ends, and whether it is under way after that.
func TestProbe(t *testing.T) {
	reason := errors.New("the caller has no more time")
	for _, tt := range []struct {
		name     string
		takes    time.Duration // the use
		err      error         // of it
		unserved time.Duration // after which the device has ended; 0: never
		want     []error
		pending  bool
	}{
		{"good", time.Second, nil, 0, nil, false},
		{"bad", time.Second, io.EOF, 0, []error{io.EOF}, false},
		{"too long", time.Minute, nil, 0, []error{errUnending, reason}, true},
		{"ended meanwhile", time.Minute, nil, 2 * time.Second, []error{errUnserved}, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newProbe(func(context.Context) error {
				time.Sleep(tt.takes)
				return tt.err
			})
			if p.pending() {
				t.Errorf("%s: pending before it was begun", tt.name)
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, reason)
			defer cancel()
			unserved := make(chan struct{})
			if tt.unserved > 0 {
				time.AfterFunc(tt.unserved, func() { close(unserved) })
			}
			err := p.run(ctx, unserved)
			if (err == nil) != (tt.want == nil) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
			for _, want := range tt.want {
				if !errors.Is(err, want) {
					t.Errorf("%s: %v, want %v", tt.name, err, want)
				}
			}
			if p.pending() != tt.pending {
				t.Errorf("%s: pending %t", tt.name, p.pending())
			}
			short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if err := p.wait(short); errors.Is(err, context.DeadlineExceeded) != tt.pending {
				t.Errorf("%s: waiting for it: %v", tt.name, err)
			}
			if err := p.wait(t.Context()); err != nil || p.pending() {
				t.Errorf("%s: %v, pending %t in the end", tt.name, err, p.pending())
			}
		})
	}
}
