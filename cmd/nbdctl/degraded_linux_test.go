package main

import (
	"strings"
	"testing"
)

// TestKernelDegraded lets a backend hang for longer than the timeout: one
// connection of two dies, everybody can see that, and it is replaced when the
// backend has come back.
func TestKernelDegraded(t *testing.T) {
	requireKernel(t, kickNoise+`|reconnected socket`)
	sh(t, "modprobe -q dm-mod || true; dmsetup create --noudevsync hanging --table '0 8192 zero'; dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync hanging")
	dev := connected(t, "file", "/dev/mapper/hanging", "--timeout", "2s", "--connections", "2", "--read-only")
	events := watching(t)
	expect(t, events, dev, map[string]any{"event": "present", "state": "live", "connections": 2.0, "connections_alive": 2.0})

	sh(t, "dmsetup suspend hanging")
	reader := stuckReader(t, dev)
	expect(t, events, dev, map[string]any{"event": "link-dead"})
	expect(t, events, dev, map[string]any{"state": "degraded", "connections_alive": 1.0})
	if table := must(t, "list"); !strings.Contains(table, "degraded") || !strings.Contains(table, "1/2") {
		t.Errorf("list does not show it:\n%s", table)
	}
	sh(t, "dmsetup resume hanging")
	expect(t, events, dev, map[string]any{"event": "state", "state": "live", "connections_alive": 2.0})
	if r := <-reader; r.code != 0 {
		t.Errorf("the reader was failed: %s", r.stderr)
	}
	must(t, "disconnect", dev)
}
