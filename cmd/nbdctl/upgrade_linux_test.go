package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// upgrades is how often each test upgrades a device.
func upgrades() int { return rounds("NBD_TEST_UPGRADES", 3) }

// TestKernelUpgrade upgrades devices again and again while they are written and verified: nothing
// fails, no byte is wrong, and all that is known of a device stays known.
func TestKernelUpgrade(t *testing.T) {
	image := func(t *testing.T) string { return filepath.Join(imageDir(t), "disk.img") }
	for _, tt := range []struct {
		name   string
		system fsKind
		flags  func(t *testing.T) []string
	}{
		{"memory, two connections", onExt4, func(*testing.T) []string {
			return []string{"memory", "--size", "64M", "-o", "limit=60M", "--connections", "2"}
		}},
		{"file, direct, two connections", onXFS, func(t *testing.T) []string {
			return []string{"file", image(t), "--create", "--size", "64M", "-o", "direct=on", "--connections", "2"}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t)
			dev := connected(t, append(tt.flags(t), "--name", "upgraded")...)
			upgradedUnderLoad(t, dev, tt.system, func() {})
		})
	}
}

// upgradedUnderLoad upgrades a device called upgraded while it is written and verified. In the end
// then is called.
func upgradedUnderLoad(t *testing.T, dev string, system fsKind, then func()) {
	t.Helper()
	index, err := nbdnl.ParseIndex(dev)
	if err != nil {
		t.Fatal(err)
	}
	incarnation, before := nbdnl.IncarnationOf(index), statusOf(t, dev)
	load := verifiedLoadOn(t, dev, system)
	written := 0.0
	var took []time.Duration
	for range upgrades() {
		load.goesOn(writes(t, dev))
		pid := ownerOf(t, dev)
		begin := time.Now()
		out := must(t, "upgrade", "upgraded")
		took = append(took, time.Since(begin))
		next := ownerOf(t, dev)
		if want := filepath.Base(dev) + " upgraded: pid " + strconv.Itoa(next) + " serves it in the place of pid " +
			strconv.Itoa(pid) + "\n"; next == pid || out != want {
			t.Errorf("upgrade prints %q, and pid %d serves the device", out, next)
		}
		if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
			t.Errorf("pid %d is still there", pid)
		}
		total := writtenOf(t, dev)
		if total <= written && total >= 0 {
			t.Errorf("%v bytes were written, and %v before", total, written)
		}
		written = total
	}
	load.goesOn(writes(t, dev))
	then()
	load.goesOn(writes(t, dev))
	load.stop()
	slices.Sort(took)
	t.Logf("an upgrade takes %v (median)", took[len(took)/2])
	after := statusOf(t, dev)
	for _, changes := range []string{"owner", "traffic", "holders", "remote", "restart"} {
		delete(before, changes)
		delete(after, changes)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the status is another (-before +after):\n%s", diff)
	}
	if nbdnl.IncarnationOf(index) != incarnation {
		t.Errorf("%s is another device", dev)
	}
	log := sh(t, "cat "+after["log"].(string))
	if n := strings.Count(log, "taken over"); n != upgrades() || strings.Count(log, `msg=connected`) != 1 {
		t.Errorf("the log tells of %d upgrades:\n%s", n, log)
	}
	sum := sh(t, "sha256sum <"+dev)
	path, isFile := strings.CutPrefix(after["backend"].(string), "file ")
	must(t, "disconnect", "upgraded")
	if isFile && sh(t, "sha256sum <"+path) != sum {
		t.Errorf("the image has other bytes than the device had")
	}
	awaitNoServer(t)
}

// writtenOf returns how many bytes were written to the device since it was connected; -1: its
// process does not know.
func writtenOf(t testing.TB, dev string) float64 {
	t.Helper()
	if r, ok := listed(t, dev)["remote"].(map[string]any); ok && r["way"] == "direct" {
		return -1
	}
	var v struct {
		Total struct{ Write struct{ Bytes float64 } }
	}
	if err := json.Unmarshal([]byte(must(t, "stats", "--json", dev)), &v); err != nil {
		t.Fatal(err)
	}
	return v.Total.Write.Bytes
}

// ownerOf returns the process that serves the device.
func ownerOf(t testing.TB, dev string) int {
	t.Helper()
	return int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64))
}
