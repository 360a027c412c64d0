package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// churnRounds is how often TestKernelChurn connects and disconnects.
const churnRounds = 200

// TestKernelChurn connects and disconnects from two processes at once. None
// may fail or hang, and nothing may be left, memory included.
func TestKernelChurn(t *testing.T) {
	requireKernel(t)
	churn(t, churnRounds)
}

// TestKernelChurnUdev is the same beside a real systemd-udevd, which opens
// every device that appears or changes.
func TestKernelChurnUdev(t *testing.T) {
	udevd, err := filepath.Abs("../../testdata/lab/udevd")
	if err != nil {
		t.Fatal(err)
	}
	requireKernel(t)
	sh(t, udevd+" start")
	defer sh(t, udevd+" stop")
	churn(t, churnRounds)
	sh(t, "udevadm settle")
}

func churn(t *testing.T, rounds int) {
	t.Helper()
	used := func() int {
		sh(t, "echo 3 >/proc/sys/vm/drop_caches")
		n, err := strconv.Atoi(sh(t, "awk '/^MemAvailable/ {print $2}' /proc/meminfo"))
		if err != nil {
			t.Fatal(err)
		}
		return -n
	}
	must(t, "disconnect", connected(t, "memory", "--size", "1M")) // what is only ever loaded once
	before := used()
	type times struct{ connect, disconnect []time.Duration }
	results := make(chan times)
	for worker := range 2 {
		go func() {
			var r times
			defer func() { results <- r }()
			for round := range rounds / 2 {
				start := time.Now()
				c := finish(t, nbdctlCommand(t, "connect", "memory", "--size", "64M"))
				if c.code != 0 {
					t.Errorf("process %d, round %d: connect: code %d, %s", worker, round, c.code, c.stderr)
					return
				}
				r.connect = append(r.connect, time.Since(start))
				dev := strings.TrimSpace(c.stdout)
				// Nobody else's device, and one that works.
				w := finish(t, command(t, "dd", "if=/dev/zero", "of="+dev, "bs=4k", "count=1", "oflag=direct", "status=none"))
				start = time.Now()
				d := finish(t, nbdctlCommand(t, "disconnect", dev))
				if w.code != 0 || d.code != 0 {
					t.Errorf("process %d, round %d: %s: write: %s; disconnect: code %d, %s", worker, round, dev, w.stderr, d.code, d.stderr)
					return
				}
				r.disconnect = append(r.disconnect, time.Since(start))
			}
		}()
	}
	var all times
	for range 2 {
		r := <-results
		all.connect = append(all.connect, r.connect...)
		all.disconnect = append(all.disconnect, r.disconnect...)
	}
	for name, d := range map[string][]time.Duration{"connect": all.connect, "disconnect": all.disconnect} {
		if len(d) != 0 {
			slices.Sort(d)
			t.Logf("%d rounds of %s, start of the program included: median %s, worst %s", len(d), name, d[len(d)/2].Round(time.Microsecond), d[len(d)-1].Round(time.Microsecond))
		}
	}
	// One lost megabyte a round would be 200; what the kernel itself caches moves by a few.
	if grown := used() - before; grown > 20<<10 {
		t.Errorf("%d KiB of memory are gone", grown)
	}
}

// TestKernelTwoDisconnects shows that of two at once one disconnects, and the
// other says clearly that there is nothing left to do, or does no harm.
func TestKernelTwoDisconnects(t *testing.T) {
	requireKernel(t)
	for range 10 {
		dev := connected(t, "memory", "--size", "1M")
		results := make(chan result)
		for range 2 {
			go func() { results <- finish(t, nbdctlCommand(t, "disconnect", dev)) }()
		}
		succeeded := 0
		for range 2 {
			switch r := <-results; r.code {
			case int(exit.OK):
				succeeded++
			case int(exit.NotFound):
				if !strings.Contains(r.stderr, "not connected") {
					t.Errorf("the loser says %q", r.stderr)
				}
			default:
				t.Errorf("code %d: %s", r.code, r.stderr)
			}
		}
		if succeeded != 1 {
			t.Errorf("%d of two disconnects succeeded", succeeded)
		}
	}
}

// TestKernelDisconnectDuringConnect shows that either the connect wins and
// the disconnect follows, or the disconnect finds nothing.
func TestKernelDisconnectDuringConnect(t *testing.T) {
	requireKernel(t)
	for i := range 20 {
		connect := nbdctlCommand(t, "connect", "memory", "--size", "1M", "--device", "nbd3", "--name", "racer")
		done := make(chan result)
		go func() { done <- finish(t, connect) }()
		// Asked in ever other moments of the connect, until it succeeds.
		codes := map[int]bool{}
		for {
			r := nbdctl(t, "disconnect", "nbd3")
			codes[r.code] = true
			if r.code == int(exit.OK) {
				break
			}
			if r.code != int(exit.NotFound) && r.code != int(exit.Busy) {
				t.Fatalf("round %d: disconnect: code %d, %s", i, r.code, r.stderr)
			}
		}
		if r := <-done; r.code != int(exit.OK) || r.stdout != "/dev/nbd3\n" {
			t.Errorf("round %d: connect: code %d, %q, %s", i, r.code, r.stdout, r.stderr)
		}
		if d := listed(t, "/dev/nbd3"); d != nil {
			t.Errorf("round %d: left: %v", i, d)
		}
	}
}

// TestKernelInterruptedConnect interrupts connect at many moments: there is
// either a device, whose path was printed, or nothing.
func TestKernelInterruptedConnect(t *testing.T) {
	requireKernel(t)
	image := filepath.Join(imageDir(t), "new.img")
	undone := 0
	for i := range 20 {
		cmd := nbdctlCommand(t, "connect", "file", image, "--create", "--size", "1M")
		var stdout, stderr lockedBuffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(i)*5*time.Millisecond, func() { _ = cmd.Process.Signal(os.Interrupt) })
		err := cmd.Wait()
		timer.Stop()
		_, missing := os.Stat(image)
		switch dev := strings.TrimSpace(stdout.String()); {
		case err == nil && dev != "":
			must(t, "disconnect", dev)
			sh(t, "rm "+image)
		case dev != "":
			t.Errorf("printed %q and failed: %v, %s", dev, err, stderr.String())
		case len(listJSON(t)) != 0:
			t.Errorf("interrupted after %d ms, left %v", 5*i, listJSON(t))
		case missing == nil:
			t.Errorf("interrupted after %d ms, left the image that it created", 5*i)
			sh(t, "rm "+image)
		default:
			undone++
		}
	}
	t.Log(fmt.Sprintf("%d of 20 were interrupted before they were done", undone))
}
