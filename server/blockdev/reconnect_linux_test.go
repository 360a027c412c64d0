package blockdev_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// awaitState waits for a state of the device, by what it tells of changes.
func awaitState(t *testing.T, d *blockdev.Device, want nbdnl.State) {
	t.Helper()
	limit := time.After(30 * time.Second)
	for d.State() != want {
		select {
		case <-d.Changes():
		case <-limit:
			t.Fatalf("%s, %d alive, want %s", d.State(), d.Alive(), want)
		}
	}
}

// stallOnce makes the first request at off wait until release is called.
func stallOnce(b *recorder, off int64) (arrived <-chan struct{}, release func()) {
	var once atomic.Bool
	here, released := make(chan struct{}), make(chan struct{})
	hook := func(_ string, at int64) error {
		if at == off && !once.Swap(true) {
			close(here)
			<-released
		}
		return nil
	}
	b.before.Store(&hook)
	return here, sync.OnceFunc(func() { close(released) })
}

// processors returns, for each connection that is used at all, a processor that submits over it.
func processors(t *testing.T, d *blockdev.Device) []int {
	t.Helper()
	lists, err := filepath.Glob(filepath.Join("/sys/block", filepath.Base(d.Path()), "mq/*/cpu_list"))
	if err != nil || len(lists) == 0 {
		t.Fatalf("no hardware queues: %v", err)
	}
	cpus := make([]int, len(lists))
	for i, list := range lists { // There are fewer than ten, so they are in order.
		b, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(strings.Split(string(b), ",")[0], &cpus[i]); err != nil {
			t.Fatalf("%s: %q: %v", list, b, err)
		}
	}
	return cpus
}

// replacements returns a logger, and what tells of each connection that was replaced.
func replacements() (*slog.Logger, <-chan struct{}) {
	c := make(replaced, 100)
	return slog.New(c), c
}

// A replaced is a handler of log messages to which only one matters.
type replaced chan struct{}

func (c replaced) Enabled(context.Context, slog.Level) bool { return true }
func (c replaced) WithAttrs([]slog.Attr) slog.Handler       { return c }
func (c replaced) WithGroup(string) slog.Handler            { return c }

func (c replaced) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "connection replaced" {
		c <- struct{}{}
	}
	return nil
}

// TestKernelReconnected has one read take longer than the device's timeout: its connection dies,
// the read is repeated on another, and a new connection takes the place of the dead one. When the
// death shows differs: a quick backend's reads are made by the goroutine that would notice it
// (server.pace), after a number of reads that is different each time.
func TestKernelReconnected(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const connections, off = 2, 65536
	b := newRecorder(1 << 20)
	log, replaced := replacements()
	d := connect(t, b, blockdev.Options{Connections: connections, Timeout: time.Second, Logger: log})
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	cpus := processors(t, d)
	for round := range 3 {
		_, release := stallOnce(b, off)
		defer release()
		p := bytes.Repeat([]byte{byte('a' + round)}, 4096)
		b.disk.WriteAt(p, off)
		start := time.Now()
		onCPU(t, cpus[round%len(cpus)], func() {
			q := aligned(t, 4096)
			if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(q, p) {
				t.Errorf("round %d: other data than are stored (%v)", round, err)
			}
		})
		t.Logf("round %d: the read took %v", round, time.Since(start))
		before := d.Stats()
		release()
		select {
		case <-replaced:
		case <-time.After(30 * time.Second):
			t.Fatalf("round %d: the connection is not replaced, %s, %d alive", round, d.State(), d.Alive())
		}
		awaitState(t, d, nbdnl.StateLive)
		for _, cpu := range cpus {
			q := aligned(t, 4096)
			onCPU(t, cpu, func() {
				for range 20 {
					if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(q, p) {
						t.Errorf("round %d, processor %d: other data than were written (%v)", round, cpu, err)
						return
					}
				}
			})
		}
		for i, s := range d.Stats() {
			if i < len(cpus) && s.Read.Requests < before[i].Read.Requests+10 {
				t.Errorf("round %d: connection %d has served %d reads, after %d",
					round, i, s.Read.Requests, before[i].Read.Requests)
			}
		}
	}
	f.Close()
}

// TestKernelWaiting has the only connection die: those who wait get their data from the one that
// takes its place, though the backend is still at work for the old one.
func TestKernelWaiting(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	copy(b.data[65536:], "stalled")
	copy(b.data[131072:], "waiting")
	log, replaced := replacements()
	d := connect(t, b, blockdev.Options{Timeout: 2 * time.Second, DeadTimeout: 30 * time.Second, Logger: log})
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	_, release := stallOnce(b, 65536)
	defer release()
	var wg sync.WaitGroup
	start := time.Now()
	read := func(off int64, want string) {
		p := aligned(t, 4096)
		wg.Go(func() {
			if _, err := f.ReadAt(p, off); err != nil || string(p[:len(want)]) != want {
				t.Errorf("at %d: %q, %v, want %q", off, p[:len(want)], err, want)
			}
			t.Logf("the read at %d took %v", off, time.Since(start))
		})
	}
	read(65536, "stalled")
	<-replaced
	t.Logf("replaced after %v", time.Since(start))
	read(131072, "waiting")
	wg.Wait()
	if d.State() != nbdnl.StateLive || d.Alive() != 1 || sum(d).InFlight == 0 {
		t.Errorf("%s, %d alive, %d in flight, while the backend is at work for the old connection",
			d.State(), d.Alive(), sum(d).InFlight)
	}
	release()
	f.Close()
	if err := d.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	if d.Err() != nil {
		t.Errorf("ended with %v", d.Err())
	}
}

// TestKernelReconfigure shortens the timeout of a device in use.
func TestKernelReconfigure(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	log, replaced := replacements()
	d := connect(t, b, blockdev.Options{Timeout: time.Hour, Logger: log})
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	short, ample := time.Second, 30*time.Second
	if err := d.Reconfigure(t.Context(), blockdev.Update{Timeout: &short, DeadTimeout: &ample}); err != nil {
		t.Fatal(err)
	}
	_, release := stallOnce(b, 65536)
	defer release()
	start := time.Now()
	done := make(chan error, 1)
	p := aligned(t, 4096)
	go func() { _, err := f.ReadAt(p, 65536); done <- err }()
	<-replaced
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	t.Logf("after %v", time.Since(start))
	f.Close()
}
