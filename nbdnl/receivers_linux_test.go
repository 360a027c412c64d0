package nbdnl_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// shutDown returns which sockets the kernel has shut down again.
func shutDown(t *testing.T, err error) []int {
	t.Helper()
	var e *nbdnl.ShutDownError
	if !errors.As(err, &e) || !errors.Is(err, nbdnl.ErrShutDown) {
		t.Fatalf("error is %v, want one of sockets that were shut down", err)
	}
	return e.Sockets
}

// A socket that the receiver of the connection before shuts down is reported, whether the receiver
// shows or not, and the next one takes its place.
func TestReconfigureUndone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		o     nbdnltest.Options
		after time.Duration
	}{
		{"the receiver shows", nbdnltest.Options{}, 400 * time.Millisecond},
		{"with Linux 5.10", nbdnltest.Options{Release: "5.10.0"}, 400 * time.Millisecond},
		{"no thread shows", nbdnltest.Options{HideThreads: true}, 80 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k := fakeWorld(t, tt.o)
				cfg, end := ending(t)
				index := w.connect(cfg)
				end()
				k.Undo(tt.after)
				update := nbdnl.Update{Sockets: unserved(t).Sockets, Timeout: &cfg.Timeout}
				err := w.Reconfigure(t.Context(), index, cfg.Identifier, update)
				if diff := cmp.Diff([]int{0}, shutDown(t, err)); diff != "" {
					t.Errorf("sockets (-want +got):\n%s", diff)
				}
				update.Sockets = unserved(t).Sockets
				w.wantReconfigured(index, cfg.Identifier, update)
			})
		})
	}
}

// Reconfigure takes no time where all receivers are seen at rest, and a bounded one where not.
func TestReconfigureSettles(t *testing.T) {
	for _, tt := range []struct {
		name     string
		o        nbdnltest.Options
		undo     []time.Duration
		min, max time.Duration
	}{
		{name: "all sleep", max: 20 * time.Millisecond},
		{
			name: "no thread shows",
			o:    nbdnltest.Options{HideThreads: true},
			min:  200 * time.Millisecond, max: 400 * time.Millisecond,
		},
		{
			name: "one does not come to rest",
			undo: []time.Duration{time.Hour},
			min:  500 * time.Millisecond, max: time.Second,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k := fakeWorld(t, tt.o)
				cfg, end := ending(t)
				index := w.connect(cfg)
				end()
				k.Undo(tt.undo...)
				begin := time.Now()
				w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets})
				if took := time.Since(begin); took < tt.min || took > tt.max {
					t.Errorf("it took %v, want %v to %v", took, tt.min, tt.max)
				}
			})
		})
	}
}

// Where no thread shows, a connection that dies late is still replaced soon after.
func TestReconfigureBlindly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{HideThreads: true})
		cfg := unserved(t)
		index := w.connect(cfg)
		w.wantDropped(w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets}), 0)
		if n := k.Commands(nbdnltest.Reconfigure); n < 40 {
			t.Errorf("%d attempts in three seconds", n)
		}
	})
}

// While a receiver is awake no socket is given, and if ctx ends before it rests none was.
func TestReconfigureWaitsForReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg, end := ending(t)
		index := w.connect(cfg)
		end()
		k.Undo(time.Hour)
		next, endNext := ending(t)
		w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Sockets: next.Sockets})
		endNext()
		before := k.Commands(nbdnltest.Reconfigure)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		err := w.Reconfigure(ctx, index, cfg.Identifier, nbdnl.Update{Sockets: unserved(t).Sockets})
		w.wantError(err, context.DeadlineExceeded)
		w.wantDropped(err, 0)
		if n := k.Commands(nbdnltest.Reconfigure) - before; n != 0 {
			t.Errorf("%d commands were given while a receiver was awake", n)
		}
	})
}

// Receivers that do not start are told of, where they show.
func TestWaitReceivers(t *testing.T) {
	for _, tt := range []struct {
		name     string
		o        nbdnltest.Options
		strand   int
		stranded bool
	}{
		{"all receive", nbdnltest.Options{}, 0, false},
		{"one does not", nbdnltest.Options{}, 1, true},
		{"with Linux 5.10", nbdnltest.Options{Release: "5.10.0"}, 1, true},
		{"no thread shows", nbdnltest.Options{HideThreads: true}, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, k := fakeWorld(t, tt.o)
				cfg, _ := ending(t)
				cfg.Sockets = append(cfg.Sockets, unserved(t).Sockets...)
				cfg.Flags |= nbdnl.FlagCanMultiConn
				k.Strand(tt.strand)
				index := w.connect(cfg)
				begin := time.Now()
				err := w.WaitReceivers(t.Context(), index, 2)
				took := time.Since(begin)
				stranded, slow := errors.Is(err, nbdnl.ErrStranded), took >= time.Second
				if stranded != tt.stranded || slow != tt.stranded {
					t.Errorf("error %v after %v", err, took)
				}
			})
		})
	}
	w, k := fakeWorld(t, nbdnltest.Options{})
	k.Strand(1)
	index := w.connect(unserved(t))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	w.wantError(w.WaitReceivers(ctx, index, 1), context.DeadlineExceeded)
}
