package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

// inheriting in the environment says what becomes of a process that takes over a fragile backend,
// or in which file that is said.
const inheriting = "NBDCTL_TEST_INHERITING"

// fate is what becomes of such a process.
func fate() string {
	said := os.Getenv(inheriting)
	if strings.HasPrefix(said, "/") {
		b, _ := os.ReadFile(said) // Without a file all goes well.
		return string(b)
	}
	return said
}

// fragileKind is memory, in tests alone, that not every process can inherit.
var fragileKind = kind.Kind{
	Name:  "fragile",
	Check: func(host.Spec) error { return nil },
	Open: func(_ context.Context, s host.Spec, _ bool) (*host.Backing, error) {
		m, err := memory.New(s.Size, memory.Options{})
		if err != nil {
			return nil, err
		}
		return fragile(m), nil
	},
	Inherit: func(_ context.Context, s host.Spec, i host.Inheritance) (*host.Backing, error) {
		size := i.Size
		switch fate() {
		case "fails":
			return nil, errors.New("it has gone to pieces")
		case "panics":
			panic("it has gone to pieces")
		case "exits":
			os.Exit(1)
		case "is killed":
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		case "hangs":
			select {}
		case "is shorter":
			size -= 4096
		}
		m, err := memory.Inherit(size, i.Files, memory.Options{})
		if err != nil {
			return nil, err
		}
		return fragile(m), nil
	},
}

func fragile(m *memory.Memory) *host.Backing {
	keep := func() (k host.Kept, err error) {
		k.Files, err = m.Files()
		return k, err
	}
	return &host.Backing{Backend: m, Close: m.Close, Keep: keep, HandOver: func() (*host.Handed, error) {
		files, err := m.Files()
		if err != nil {
			return nil, err
		}
		// They go with the process.
		return &host.Handed{Files: files, Resume: func() {}, Leave: m.Leave}, nil
	}}
}

// TestKernelUpgradeFails upgrades devices that are written and verified, while something is wrong
// with the process that is to take over: whoever served them goes on, and the next upgrade
// succeeds.
func TestKernelUpgradeFails(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "fragile", "--size", "64M", "--timeout", "4s", "--connections", "2")
	load := verifiedLoad(t, dev)
	pid := ownerOf(t, dev)
	for _, tt := range []struct{ what, says string }{
		{"fails", "it has gone to pieces"},
		{"panics", "the other process has hung up"},
		{"exits", "the other process has hung up"},
		{"is killed", "the other process has hung up"},
		{"hangs", "the other process takes too long"},
		{"is shorter", "backend size is 67104768 instead of 67108864"},
	} {
		before := writes(t, dev)
		cmd := nbdctlCommand(t, "upgrade", dev)
		cmd.Env = append(cmd.Env, inheriting+"="+tt.what)
		begin := time.Now()
		if r := finish(t, cmd); !r.ended(exit.Failure, filepath.Base(dev)+" was not upgraded: ", tt.says) {
			t.Errorf("%s: exit code %d, %s%s", tt.what, r.code, r.stdout, r.stderr)
		}
		if took := time.Since(begin); took > 20*time.Second {
			t.Errorf("%s: it took %v", tt.what, took)
		}
		load.goesOn(before)
		if now, state := ownerOf(t, dev), listed(t, dev)["state"]; now != pid || state != "live" {
			t.Errorf("%s: the device is %v, served by pid %d in the place of %d", tt.what, state, now, pid)
		}
		awaitServers(t, pid)
		if left := sh(t, "ls -A $NBDCTL_STATE_DIR/*/"); strings.Contains(left, "next") {
			t.Errorf("%s: the state directory has %s", tt.what, left)
		}
	}
	must(t, "upgrade", dev)
	load.goesOn(writes(t, dev))
	load.stop()
	if log := sh(t, "cat "+statusOf(t, dev)["log"].(string)); strings.Count(log, "goes on serving") != 6 {
		t.Errorf("the log is:\n%s", log)
	}
}

// awaitServers waits until the process pid is the only one that serves.
func awaitServers(t *testing.T, pid int) {
	t.Helper()
	want := strconv.Itoa(pid)
	eventually(t, func() bool {
		all := serving(t, os.Getenv("NBDCTL_STATE_DIR"))
		return len(all) == 1 && all[0] == want
	}, "pid %d alone to serve", pid)
}

// TestKernelUpgradeKilled kills the command, or the process that it has started, at any moment: the
// device is served by one process then, and no byte is wrong.
func TestKernelUpgradeKilled(t *testing.T) {
	requireKernel(t, `Receive control failed|Dead connection|Connection timed out|reconnected socket|Send disconnect`)
	dev := connected(t, "file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M", "--timeout", "4s",
		"--dead-timeout", "30s")
	load := verifiedLoad(t, dev)
	done := 0
	for round := range 2 * upgrades() {
		before, pid := writes(t, dev), ownerOf(t, dev)
		cmd := nbdctlCommand(t, "upgrade", dev)
		ended := begin(t, cmd)
		time.Sleep(rand.N(400 * time.Millisecond)) // any moment of an upgrade
		if round%2 == 0 {
			_ = cmd.Process.Kill() // It may have ended.
		} else {
			killSuccessor(t, pid)
		}
		<-ended
		eventually(t, func() bool {
			all := serving(t, os.Getenv("NBDCTL_STATE_DIR"))
			return len(all) == 1 && all[0] == strconv.Itoa(ownerOf(t, dev))
		}, "one process to serve")
		if ownerOf(t, dev) != pid {
			done++
		}
		load.goesOn(before)
	}
	t.Logf("%d of %d upgrades were done", done, 2*upgrades())
	must(t, "upgrade", dev)
	load.goesOn(writes(t, dev))
	load.stop()
}

// killSuccessor kills a process that is about to serve a device, if there is one besides pid and it
// serves none yet.
func killSuccessor(t *testing.T, pid int) {
	t.Helper()
	for _, p := range serving(t, os.Getenv("NBDCTL_STATE_DIR")) {
		fds, _ := filepath.Glob("/proc/" + p + "/fd/*")
		locked := false
		for _, fd := range fds {
			to, _ := os.Readlink(fd)
			locked = locked || strings.HasSuffix(to, "/lock")
		}
		if n, _ := strconv.Atoi(p); n != pid && !locked {
			_ = syscall.Kill(n, syscall.SIGKILL)
		}
	}
}

// TestKernelUpgradeScarce upgrades where something is missing on the machine.
func TestKernelUpgradeScarce(t *testing.T) {
	requireKernel(t)
	dir := os.Getenv("NBDCTL_STATE_DIR")
	sh(t, "mount -t tmpfs -o size=256k,mode=755 tmpfs "+dir)
	t.Cleanup(func() { sh(t, "umount -l "+dir) })
	dev := connected(t, "memory", "--size", "64M", "--name", "scarce")
	load := verifiedLoad(t, dev)
	pid := ownerOf(t, dev)
	refused := func(what string, r result, says ...string) {
		t.Helper()
		if r.code == 0 || !containsAll(r.stderr, says...) || strings.Contains(r.stderr, "panic") {
			t.Errorf("%s: exit code %d, %s", what, r.code, r.stderr)
		}
		load.goesOn(writes(t, dev))
		if l := listed(t, dev); ownerOf(t, dev) != pid || l["state"] != "live" {
			t.Errorf("%s: the device is %v", what, l)
		}
		awaitServers(t, pid)
	}
	sh(t, "dd if=/dev/zero of="+dir+"/filler bs=4k status=none || true")
	refused("full", nbdctl(t, "upgrade", dev), "not upgraded", "no space left on device")
	sh(t, "rm "+dir+"/filler; mount --bind "+dir+" "+dir+"; mount -o remount,bind,ro "+dir)
	refused("read-only", nbdctl(t, "upgrade", dev), "not upgraded", "read-only file system")
	sh(t, "umount "+dir)

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	for n := 7; n < 64; n += 2 {
		cmd := command(t, "sh", "-c", fmt.Sprintf("ulimit -n %d; exec %s upgrade %s", n, self, dev))
		cmd.Env = append(os.Environ(), runAsNbdctl+"=1")
		r := finish(t, cmd)
		if r.code == 0 {
			last = n
			break
		}
		refused(fmt.Sprint(n, " descriptors"), r)
	}
	t.Logf("%d descriptors are enough", last)
	if last == 0 {
		t.Fatal("no upgrade has succeeded")
	}
	pid = ownerOf(t, dev)
	sh(t, fmt.Sprintf("prlimit --nofile=1024:1024 --pid %d", pid))
	must(t, "upgrade", dev)
	load.goesOn(writes(t, dev))
	load.stop()
}
