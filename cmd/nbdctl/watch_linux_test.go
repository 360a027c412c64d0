package main

import (
	"bufio"
	"encoding/json"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// watching runs watch --json until the test ends, and returns its events.
func watching(t *testing.T) <-chan map[string]any {
	t.Helper()
	cmd := nbdctlCommand(t, "watch", "--json")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	events := make(chan map[string]any, 1000)
	go func() {
		defer close(events)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var e map[string]any
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				t.Errorf("%q: %v", lines.Text(), err)
			}
			events <- e
		}
	}()
	t.Cleanup(func() {
		interrupt(t, cmd)
		for range events {
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("an interrupted watch: %v", err)
		}
	})
	return events
}

// expect takes events of dev until one is as wanted.
func expect(t *testing.T, events <-chan map[string]any, dev string, want map[string]any) map[string]any {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	var seen []map[string]any
	for {
		select {
		case e := <-events:
			if e["name"] != filepath.Base(dev) {
				continue
			}
			seen = append(seen, e)
			got := map[string]any{}
			for key := range want {
				got[key] = e[key]
			}
			if cmp.Equal(want, got) {
				return e
			}
		case <-deadline.C:
			t.Fatalf("no event %v, only %v", want, seen)
		}
	}
}

// TestKernelWatch sees what happens to our devices and to a stranger's.
func TestKernelWatch(t *testing.T) {
	requireKernel(t, kickNoise)
	present := connected(t, "memory", "--size", "1M", "--name", "early", "--restart", "no")
	events := watching(t)
	e := expect(t, events, present, map[string]any{"event": "present", "state": "live", "label": "early"})
	if _, err := time.Parse(time.RFC3339, e["time"].(string)); err != nil {
		t.Error(err)
	}

	dev := connected(t, "memory", "--size", "64M")
	// Whether it is seen on its way is a matter of luck.
	live := map[string]any{"state": "live", "size": float64(64 << 20), "backend": "memory"}
	if e := expect(t, events, dev, map[string]any{"event": "connect"}); e["state"] != "live" {
		expect(t, events, dev, live)
	}
	must(t, "resize", dev, "96M")
	expect(t, events, dev, map[string]any{"event": "resize", "size": float64(96 << 20)})
	must(t, "disconnect", dev)
	expect(t, events, dev, map[string]any{"event": "disconnect", "state": "idle", "backend": "memory"})

	kill(t, present, syscall.SIGKILL)
	expect(t, events, present, map[string]any{"event": "link-dead"})
	must(t, "disconnect", present)
	expect(t, events, present, map[string]any{"event": "disconnect"})

	t.Run("stranger", func(t *testing.T) {
		other := stranger(t)
		expect(t, events, other, map[string]any{
			"event":   "connect",
			"state":   "live",
			"backend": nil,
			"size":    float64(1 << 20),
		})
	})
	// Which is disconnected when its test ends.
	for e := range events {
		if e["event"] == "disconnect" {
			break
		}
	}
}

// TestKernelWatchUnprivileged shows that watch needs no privilege.
func TestKernelWatchUnprivileged(t *testing.T) {
	requireKernel(t)
	watch := commandAs(t, nobody, "watch")
	var stdout, stderr lockedBuffer
	watch.Stdout, watch.Stderr = &stdout, &stderr
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	dev := connected(t, "memory", "--size", "1M")
	stdout.await(t, "live")
	must(t, "disconnect", dev)
	stdout.await(t, "disconnect")
	interrupt(t, watch)
	if err := watch.Wait(); err != nil || stderr.String() != "" {
		t.Errorf("%v: %s", err, stderr.String())
	}
}
