package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelUpgradePauses upgrades a device of each kind under several loads, all of which verify
// what they have written, and tells for how long nothing was completed: make bench-handover.
func TestKernelUpgradePauses(t *testing.T) {
	requireKernel(t)
	connections := os.Getenv("NBD_TEST_CONNECTIONS")
	if connections == "" {
		connections = "1"
	}
	for _, tt := range []struct {
		name    string
		backend func(t *testing.T) []string
	}{
		{"memory", func(*testing.T) []string { return []string{"memory", "--size", "64M"} }},
		{"file", func(t *testing.T) []string {
			return []string{"file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M"}
		}},
		{"relay", func(t *testing.T) []string {
			server := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{server.uri, "-o", "way=relay"}
		}},
		{"direct", func(t *testing.T) []string {
			server := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{server.uri, "-o", "way=direct"}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "direct" || tt.name == "relay" {
				nbdnltest.Waking.Need(t)
			}
			dev := connected(t, append(tt.backend(t), "--connections", connections)...)
			for _, l := range []struct{ name, flags string }{
				{"4k, 32 at once", "--rw=randwrite --bs=4k --iodepth=32"},
				{"an fsync behind each write", "--rw=randwrite --bs=4k --fsync=1"},
				{"in sequence, 128k", "--rw=write --bs=128k --iodepth=4"},
			} {
				load := rawLoad(t, dev, l.flags)
				var pauses, usual []time.Duration
				for range rounds("NBD_TEST_PAUSES", 1) {
					usual = append(usual, longestGap(t, dev, func() { load.goesOn(writes(t, dev)) }))
					pauses = append(pauses, longestGap(t, dev, func() { must(t, "upgrade", dev) }))
				}
				load.stop(t)
				t.Logf("%s, %s: %d upgrades; nothing was completed for %s; without one for %s",
					tt.name, l.name, len(pauses), spread(pauses), spread(usual))
			}
			must(t, "disconnect", dev)
		})
	}
}

// spread tells median, 99th percentile and maximum.
func spread(d []time.Duration) string {
	slices.Sort(d)
	r := func(i int) time.Duration { return d[min(i, len(d)-1)].Round(100 * time.Microsecond) }
	return fmt.Sprintf("%v (median), %v (p99), %v at most", r(len(d)/2), r(len(d)*99/100), r(len(d)))
}

// longestGap returns for how long the device has completed nothing at the most, while something is
// done.
func longestGap(t *testing.T, dev string, do func()) time.Duration {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	longest := make(chan time.Duration, 1)
	go func() {
		var gap time.Duration
		last, at := "", time.Now()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			// Reads, writes, discards and flushes completed, without how many are in flight and for
			// how long.
			f := strings.Fields(sysfs(t, dev, "stat"))
			now := strings.Join([]string{f[0], f[4], f[11], f[15]}, " ")
			if now != last {
				last, at = now, time.Now()
			}
			gap = max(gap, time.Since(at))
			<-tick.C
		}
		longest <- gap
	}()
	do()
	cancel()
	return <-longest
}

// A loading is a load of the device itself.
type loading struct {
	dev  string
	t    *testing.T
	cmd  *exec.Cmd
	said *strings.Builder
}

// rawLoad writes to the device and verifies what it has written, until it is told to stop.
func rawLoad(t *testing.T, dev, flags string) *loading {
	t.Helper()
	l := &loading{dev: dev, t: t, said: new(strings.Builder)}
	l.cmd = exec.Command("fio", append([]string{
		"--name=verify", "--filename=" + dev, "--size=16M", "--minimal", "--ioengine=libaio", "--direct=1",
		"--time_based", "--runtime=1d", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_backlog=256",
		"--verify_state_save=0",
	}, strings.Fields(flags)...)...)
	l.cmd.Stdout, l.cmd.Stderr = l.said, l.said
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.cmd.Process.Kill() })
	l.goesOn(writes(t, dev))
	return l
}

// goesOn waits until more is written than before.
func (l *loading) goesOn(before int) {
	l.t.Helper()
	eventually(l.t, func() bool { return writes(l.t, l.dev) > before+50 }, "writes to go on")
}

// stop ends the load, which must not have met an error.
func (l *loading) stop(t *testing.T) {
	t.Helper()
	if err := l.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	err := l.cmd.Wait()
	said := l.said.String()
	// An end by a signal is 128; the fifth of what it tells in the end is the error (fio(1)).
	_, terse, found := strings.Cut(said, "\n3;")
	fields := strings.Split(terse, ";")
	if !found || len(fields) < 4 || fields[3] != "0" || strings.Contains(said, "verify:") ||
		l.cmd.ProcessState.ExitCode() != 128 {
		t.Errorf("the load: %v: %s", err, said)
	}
}
