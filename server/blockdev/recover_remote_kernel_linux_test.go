package blockdev_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelRecoverRemote lets go of a device whose kernel speaks with another server, as a process
// does that dies, while fio writes and verifies, and goes on with it: with descriptors of all
// connections, with those of connections that were replaced since, and with none. What is not seen
// is found alive, without a word to the kernel, and replaced when the server is ended.
func TestKernelRecoverRemote(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size, connections, rounds = 16 << 20, 2, 6
	f, disk := newFarServer(t, size)
	export, err := f.dial(t.Context(), connections)
	if err != nil {
		t.Fatal(err)
	}
	client, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	o := blockdev.Options{
		Connections: connections, Timeout: 5 * time.Second, DeadTimeout: time.Minute, Client: client,
	}
	d, err := blockdev.ConnectRemote(t.Context(), export, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { d.Close() }()
	load, goesOn := f.load(t, d)
	replaced := int64(0)
	restart := func(round int) {
		t.Helper()
		f.stop(t)
		f.start(t)
		replaced += connections
		awaitConnections(t, d, replaced, round)
	}
	for round := range rounds {
		goesOn(round)
		doc, files, err := d.Keep()
		if err != nil {
			t.Fatal(err)
		}
		want := connections
		if round%3 == 1 { // The keeper does not hear of it.
			restart(round)
			want = 0
		}
		left, err := client.Status(t.Context(), d.Index())
		if err != nil {
			t.Fatal(err)
		}
		h, err := d.HandOver(t.Context(), blockdev.HandOverOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(h.Complete(), d.Close(), export.Close()); err != nil {
			t.Fatal(err)
		}
		if export, err = f.dial(t.Context(), connections); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if round%3 == 2 {
			d, err = blockdev.AttachRemote(t.Context(), left, export, o)
			want, replaced = 0, 0 // It counts from here on.
		} else {
			d, err = blockdev.RecoverRemote(t.Context(), doc, files, export, blockdev.Options{Client: client})
			replaced = doc.Replaced
		}
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for _, f := range files {
			f.Close()
		}
		took := time.Since(start)
		if kept, _ := d.Recovered(); kept != want {
			t.Errorf("round %d: %d connections were kept, want %d", round, kept, want)
		}
		goesOn(round)
		awaitConnections(t, d, replaced, round)
		// Found, it is no loss of one. The time is what the kernel may take to notice an end.
		for deadline := time.Now().Add(10 * time.Second); d.State() != nbdnl.StateLive; {
			if time.Now().After(deadline) {
				t.Fatalf("round %d: %v, %+v", round, d.State(), d.Outage())
			}
			<-d.Changes()
		}
		t.Logf("round %d: %d kept; taken after %v, all alive after %v", round, want, took, time.Since(start))
		if o := d.Outage(); o.Replaced != replaced || o.Alive != connections {
			t.Errorf("round %d: %+v", round, o)
		}
		restart(round)
	}
	goesOn(rounds)
	load.stop(t)
	if d.Loss() != nil {
		t.Error(d.Loss())
	}
	if err := errors.Join(d.Disconnect(t.Context()), export.Close()); err != nil {
		t.Error(err)
	}
	f.stop(t)
	if _, err := os.Stat("/sys/block/nbd0/pid"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the device is still there: %v", err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

// awaitConnections waits until all connections are alive, so many of which were replaced.
func awaitConnections(t *testing.T, d *blockdev.Device, replaced int64, round int) {
	t.Helper()
	for o := d.Outage(); o.Replaced < replaced || o.Alive < d.Connections(); o = d.Outage() {
		select {
		case <-d.Changes():
		case <-d.Done():
			t.Fatalf("round %d: %v", round, d.Err())
		case <-time.After(time.Minute):
			t.Fatalf("round %d: %+v, want %d replaced", round, o, replaced)
		}
	}
}
