package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// A deviceSuite is devices that get loads in turn, in the lab's kernel.
type deviceSuite struct {
	suite
	devices []device
}

// deviceSuites lists those of which some cases are wanted. What settings do is measured only if it
// is named.
func deviceSuites(o options) []deviceSuite {
	suites := []deviceSuite{
		{suite{name: "kernel", loads: deviceLoads()}, devices()},
		{suite{name: "remote", loads: remoteLoads()}, remoteDevices()},
	}
	if o.wanted.String() != "" {
		suites = append(suites, deviceSuite{suite{name: "tuning", loads: tuningLoads()}, tunings()})
	}
	var wanted []deviceSuite
	for _, s := range suites {
		if s.suite = s.selected(o.wanted); s.loads != nil {
			wanted = append(wanted, s)
		}
	}
	return wanted
}

// deviceLoads are what fio does to devices: random, 4k and 128k, one and 32 in flight.
func deviceLoads() []load {
	var loads []load
	for _, block := range []int{4 << 10, 128 << 10} {
		for _, depth := range []int{1, 32} {
			for _, l := range []load{{name: "rr", reads: 100}, {name: "rw"}} {
				l.name = fmt.Sprintf("%s%dk-q%d", l.name, block>>10, depth)
				l.block, l.depth = block, depth
				loads = append(loads, l)
			}
		}
	}
	return loads
}

// measureKernel measures devices in the lab's kernel: this program starts itself inside.
func measureKernel(ctx context.Context, o options, w *workspace) ([]*result, error) {
	suites := deviceSuites(o)
	if suites == nil {
		return nil, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	const file = "kernel.json"
	began := time.Now()
	cmd := exec.CommandContext(ctx, filepath.Join(w.tree, "testdata/lab/uml"),
		"--mem", "2G", "--disk", "0", "--timeout", "1800", "--out", w.dir,
		"--", self, "-inside", "/mnt/out/"+file, "-out", w.dir, "-cases", o.wanted.String(),
		"-rounds", strconv.Itoa(o.alternations), "-fio", o.fio.String(),
	)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // The lab takes its machine along.
	cmd.WaitDelay = startPatience
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("in the lab: %w", err)
	}
	b, err := os.ReadFile(w.path(file))
	if err != nil {
		return nil, err
	}
	var results []*result
	if err := json.Unmarshal(b, &results); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, r := range results {
		for _, s := range suites {
			for _, l := range s.loads {
				if r.Case == s.caseName(l) {
					r.block = l.block
				}
			}
		}
	}
	log.Printf("%-26s %4.1f s", "kernel", time.Since(began).Seconds())
	return results, nil
}
