//go:build survive

package main

import (
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestKernelRestartTimes kills the process that serves a device of each kind, again and again under
// several loads, all of which verify what they have written, and tells how soon something new is
// read, how soon what was in flight goes on, and how often no connection was broken: make
// bench-handover.
func TestKernelRestartTimes(t *testing.T) {
	requireKernel(t, lostNoise)
	for _, tt := range []struct {
		name    string
		backend func(t *testing.T) []string
	}{
		{"memory", func(*testing.T) []string { return []string{"memory", "--size", "64M", "--timeout", "3s"} }},
		{"file", func(t *testing.T) []string {
			image := filepath.Join(imageDir(t), "disk.img")
			return []string{"file", image, "--create", "--size", "64M", "--timeout", "3s"}
		}},
		{"relay", func(t *testing.T) []string {
			server := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{server.uri, "-o", "way=relay", "--timeout", "1s", "--dead-timeout", "10s"} // 12 s
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := connected(t, append(tt.backend(t), "--restart", "1000000")...)
			for _, l := range []struct{ name, flags string }{
				{"4k, 32 at once", "--rw=randwrite --bs=4k --iodepth=32"},
				{"an fsync behind each write", "--rw=randwrite --bs=4k --fsync=1"},
				{"in sequence, 128k", "--rw=write --bs=128k --iodepth=4"},
			} {
				load := rawLoad(t, dev, l.flags)
				undisturbed := undisturbedOf(t, dev)
				var fresh, flows times
				for range kills() {
					load.goesOn(writes(t, dev))
					pid := kill(t, dev, syscall.SIGKILL)
					killed := time.Now()
					before := writes(t, dev)
					read := readOnce(t, dev)
					load.goesOn(before)
					flows = append(flows, time.Since(killed))
					fresh = append(fresh, (<-read).Sub(killed))
					eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
				}
				load.stop(t)
				t.Logf("%s, %s: %d kills, of which %v broke no connection; something new was read in %v; "+
					"what was in flight went on in %v", tt.name, l.name, len(fresh), undisturbedOf(t, dev)-undisturbed,
					fresh, flows)
			}
			must(t, "disconnect", dev)
		})
	}
	awaitNoServer(t)
}

// undisturbedOf returns how many restarts of the device broke no connection.
func undisturbedOf(t *testing.T, dev string) float64 {
	t.Helper()
	return listed(t, dev)["restart"].(map[string]any)["undisturbed"].(float64)
}
