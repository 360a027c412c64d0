package main

import (
	"os"
	"strings"
	"testing"
)

// TestKernelDegraded lets a backend hang for longer than the timeout: one
// connection of two dies, everybody can see that, and it is replaced although the
// backend has not come back.
func TestKernelDegraded(t *testing.T) {
	requireKernel(t, kickNoise+`|reconnected socket`)
	sh(t, "modprobe -q dm-mod || true; dmsetup create --noudevsync hanging --table '0 8192 zero'; dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync hanging")
	// The dead timeout is for the reader, who waits for all that follows.
	dev := connected(t, "file", "/dev/mapper/hanging", "--timeout", "10s", "--dead-timeout", "2m",
		"--connections", "2", "--read-only")
	events := watching(t)
	expect(t, events, dev, map[string]any{
		"event":             "present",
		"state":             "live",
		"connections":       2.0,
		"connections_alive": 2.0,
	})

	sh(t, "dmsetup suspend hanging")
	reader := stuckReader(t, dev)
	// For how long it is degraded is a matter of moments.
	e := expect(t, events, dev, map[string]any{"event": "link-dead"})
	if e["state"] != "live" && e["state"] != "degraded" {
		t.Errorf("it is %v", e["state"])
	}
	log := statusOf(t, dev)["log"].(string)
	replaced := func() bool {
		said, err := os.ReadFile(log)
		return err == nil && strings.Contains(string(said), "connection replaced")
	}
	eventually(t, replaced, "another connection in the place of the dead one")
	mended := func() bool { d := listed(t, dev); return d["state"] == "live" && d["connections_alive"] == 2.0 }
	eventually(t, mended, "two connections")
	sh(t, "dmsetup resume hanging")
	if r := <-reader; r.code != 0 {
		t.Errorf("the reader was failed: %s", r.stderr)
	}
	must(t, "disconnect", dev)
}

// TestKernelBackendLost lets the backend of a device with one connection hang:
// its users get an I/O error, the device goes, and the process follows when the
// backend lets it.
func TestKernelBackendLost(t *testing.T) {
	requireKernel(t, kickNoise)
	sh(t, "modprobe -q dm-mod || true; dmsetup create --noudevsync hanging --table '0 8192 zero'; dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync hanging")
	dev := connected(t, "file", "/dev/mapper/hanging", "--timeout", "2s", "--read-only", "--restart", "no")
	sh(t, "dmsetup suspend hanging")
	if r := <-stuckReader(t, dev); r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
		t.Errorf("the reader: code %d, %s", r.code, r.stderr)
	}
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
	again := connected(t, "memory", "--size", "1M", "--device", dev)
	must(t, "disconnect", again)
	dir := os.Getenv("NBDCTL_STATE_DIR")
	if len(serving(t, dir)) != 1 {
		t.Error("the process did not wait for its backend")
	}
	sh(t, "dmsetup resume hanging")
	eventually(t, func() bool { return len(serving(t, dir)) == 0 }, "the end of the process")
}
