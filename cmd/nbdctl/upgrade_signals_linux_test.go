package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestKernelUpgradeTerminated ends the process that serves a device in order at any moment of an
// upgrade: the device ends, whichever process has it then.
func TestKernelUpgradeTerminated(t *testing.T) {
	requireKernel(t)
	passed := 0
	for range 3 * upgrades() {
		dev := connected(t, "memory", "--size", "1M")
		log, pid := statusOf(t, dev)["log"].(string), ownerOf(t, dev)
		said := readAll(t, log)
		upgrade := begin(t, nbdctlCommand(t, "upgrade", dev))
		time.Sleep(rand.N(500 * time.Millisecond)) // any moment of an upgrade
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			<-upgrade // It has ended, and another one serves.
			must(t, "disconnect", dev)
			continue
		}
		<-upgrade // with success or not
		eventually(t, func() bool { return listed(t, dev) == nil }, "the end of %s", dev)
		if strings.Contains(said(), `msg="passed on"`) {
			passed++
		}
		awaitNoServer(t)
	}
	t.Logf("%d signals were passed on", passed)
}

// readAll opens a log, which can be read later, also when it has gone.
func readAll(t *testing.T, path string) func() string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return func() string {
		b := make([]byte, 1<<20)
		n, _ := f.ReadAt(b, 0) // to its end
		return string(b[:n])
	}
}

// TestServeUpgradeSignals gives signals to the processes of a server at any moment of an upgrade:
// they do what they do otherwise.
func TestServeUpgradeSignals(t *testing.T) {
	tools(t, "nbdinfo")
	for round := range 3 * upgrades() {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			dir := shortDir(t)
			sh(t, "cd "+dir+"; truncate -s 16M disk.img new.img")
			file, control := filepath.Join(dir, "exports.json"), filepath.Join(dir, "ctl")
			define := func(more string) {
				t.Helper()
				text := `{"version": 1, "exports": [{"name": "disk", "kind": "file", "arg": "disk.img"}` + more + `]}`
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			define("")
			at := "unix:" + filepath.Join(dir, "s")
			first, uri, stderr := servedFor(t, "--exports", file, "--listen", at, "--control", control)
			endAll(t, file)
			defer func() {
				if t.Failed() {
					t.Logf("pid %d, and it says:\n%s", first.Process.Pid, stderr)
				}
			}()
			load := loadClient(t, uri, nbd.Options{}, 0)
			if round%2 == 0 {
				must(t, "upgrade", "--server", control) // One is between the first and the last then.
			}
			define(`, {"name": "new", "kind": "file", "arg": "new.img"}`)
			upgrade := begin(t, nbdctlCommand(t, "upgrade", "--server", control))
			time.Sleep(rand.N(100 * time.Millisecond)) // any moment of an upgrade
			pids := processes(t, file)
			// Whoever gets it, but the last one while it starts.
			if err := syscall.Kill(slices.Min(pids), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			if r := <-upgrade; r.code != 0 {
				t.Errorf("upgrade: %d, %s", r.code, r.stderr)
			}
			list := strings.Replace(uri, "/disk?", "/?", 1)
			read := false
			for patience := time.Now().Add(20 * time.Second); !read && time.Now().Before(patience); {
				read = len(listedAt(t, list)) == 2
			}
			if !read {
				t.Fatalf("the new export is not offered: %v", processes(t, file))
			}
			load.goesOn(t)
			load.stop(t)

			upgrade = begin(t, nbdctlCommand(t, "upgrade", "--server", control))
			time.Sleep(rand.N(100 * time.Millisecond))
			if err := first.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- first.Wait() }()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("the server: %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("it has not ended: %v", processes(t, file))
			}
			<-upgrade // with success or not
			if left := processes(t, file); len(left) != 0 {
				t.Errorf("left are %v", left)
			}
			if left := files(t, dir); len(left) != 3 {
				t.Errorf("left are %v", left)
			}
		})
	}
}
