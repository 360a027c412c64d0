package inventory

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestWatch follows devices through what the kernel tells of them and what their records do.
func TestWatch(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 3})
	ours := host.IdentifierPrefix + ":" + uuidOf(1)
	m.connect(0, "other:0")
	ctx, cancel := context.WithCancel(t.Context())
	events, ended := make(chan Event, 16), make(chan error, 1)
	go func() { ended <- m.Watch(ctx, func(e Event) error { events <- e; return nil }) }()
	type line struct{ Event, Name, State string }
	next := func() Event {
		t.Helper()
		select {
		case e := <-events:
			return e
		case err := <-ended:
			t.Fatalf("it has ended: %v", err)
		case <-time.After(30 * time.Second):
			t.Fatal("no event")
		}
		panic("unreachable")
	}
	expect := func(want line) View {
		t.Helper()
		e := next()
		if diff := cmp.Diff(want, line{e.Event, e.Name, e.State}); diff != "" {
			t.Error(diff)
		}
		return e.View
	}
	expect(line{EventPresent, "nbd0", "live"})
	m.put(record(1, nil), false)
	m.connect(1, ours)
	if v := expect(line{"connect", "nbd1", "live"}); v.Backend == nil || *v.Backend != "memory" || !v.Owner.Ours {
		t.Errorf("it shows as %+v", v)
	}
	m.change(record(1, func(r *host.Record) { r.Phase = host.PhaseDegraded }))
	expect(line{"state", "nbd1", "degraded"})
	m.change(record(1, func(r *host.Record) { r.Loss = &host.Loss{Error: "no space left on device"} }))
	if v := expect(line{"state", "nbd1", "live"}); v.Loss == nil {
		t.Error("the loss does not show")
	}
	if err := m.client.Drop(t.Context(), 1, ours); err != nil {
		t.Fatal(err)
	}
	gone := next()
	for gone.Event == "state" { // what the kernel shows of it on its way down
		gone = next()
	}
	if diff := cmp.Diff(line{"disconnect", "nbd1", "idle"}, line{gone.Event, gone.Name, gone.State}); diff != "" ||
		gone.Backend == nil {
		t.Errorf("of a device that has gone it tells %+v", gone)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestWatchDeaf ends when who is told does not listen any more.
func TestWatchDeaf(t *testing.T) {
	m := newMachine(t, nbdnltest.Options{Devices: 1})
	m.connect(0, "other:0")
	gone := errors.New("gone")
	if err := m.Watch(t.Context(), func(Event) error { return gone }); !errors.Is(err, gone) {
		t.Error(err)
	}
}

// TestSame holds what of a record is worth an event.
func TestSame(t *testing.T) {
	base := func() View {
		return View{State: "live", Connections: known(2, true), Serving: known(2, true),
			Timeout: known(int64(30), true), DeadTimeout: known(int64(0), true)}
	}
	for _, tt := range []struct {
		name   string
		change func(*View)
		same   bool
	}{
		{"nothing", func(v *View) {}, true},
		{"the label", func(v *View) { v.Label = known("x", true) }, true},
		{"that all connections are alive is not told any more", func(v *View) { v.Serving = nil }, true},
		{"the state", func(v *View) { v.State = "degraded" }, false},
		{"a connection has died", func(v *View) { v.Serving = known(1, true) }, false},
		{"a timeout", func(v *View) { v.Timeout = known(int64(31), true) }, false},
		{"the other timeout", func(v *View) { v.DeadTimeout = known(int64(1), true) }, false},
		{"the record has gone", func(v *View) {
			v.Connections, v.Serving = nil, nil
			v.Timeout, v.DeadTimeout = nil, nil
		}, false},
		{"a loss", func(v *View) { v.Loss = &host.Loss{} }, false},
	} {
		v := base()
		tt.change(&v)
		if got := same(base(), v); got != tt.same {
			t.Errorf("%s: the same %v, want %v", tt.name, got, tt.same)
		}
	}
}
