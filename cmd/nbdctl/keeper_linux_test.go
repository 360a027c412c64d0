package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// kills is how often a process is killed in each test of that.
func kills() int { return rounds("NBD_TEST_KILLS", 2) }

// TestKernelRestart kills serving processes under load: another one takes the place of each, no
// request fails, and no byte is wrong.
func TestKernelRestart(t *testing.T) {
	for _, tt := range []struct {
		name   string
		system fsKind
		args   func(t *testing.T) []string
	}{
		{"memory", onExt4, func(*testing.T) []string { return []string{"memory", "--size", "64M"} }},
		{"file, two connections", onExt4, func(t *testing.T) []string {
			return []string{"file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M",
				"--connections", "2"}
		}},
		{"file, direct", onXFS, func(t *testing.T) []string {
			return []string{"file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M",
				"-o", "direct=on"}
		}},
		{"relay", onExt4, func(t *testing.T) []string {
			f := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{f.uri, "-o", "way=relay", "--timeout", "1s", "--dead-timeout", "4s"} // 6 s for the kernel
		}},
		{"remote, direct, two connections", onExt4, func(t *testing.T) []string {
			f := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{f.uri, "-o", "way=direct", "--connections", "2"}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t, lostNoise)
			flags := []string{"--name", "kept", "--timeout", "2s", "--restart", "1000"}
			dev := connected(t, append(flags, tt.args(t)...)...)
			restartedUnderLoad(t, dev, tt.system)
		})
	}
}

func restartedUnderLoad(t *testing.T, dev string, system fsKind) {
	t.Helper()
	before := statusOf(t, dev)
	load := verifiedLoadOn(t, dev, system)
	var took times
	for n := range kills() {
		load.goesOn(writes(t, dev))
		begin := time.Now()
		pid := kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
		took = append(took, time.Since(begin))
		eventually(t, func() bool {
			d := listed(t, dev)
			restart := d["restart"].(map[string]any)
			return d["state"] == "live" && restart["by"] == "keeper" && restart["restarts"] == float64(n+1)
		}, "restart %d to be shown", n+1)
		load.goesOn(writes(t, dev))
	}
	load.stop()
	restart := listed(t, dev)["restart"].(map[string]any)
	t.Logf("another process serves after %v; %v of %v restarts broke no connection",
		took, restart["undisturbed"], restart["restarts"])
	pid := kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	sh(t, "dd if="+dev+" iflag=direct bs=4k count=1 of=/dev/null status=none")
	idle := listed(t, dev)["restart"].(map[string]any)
	if idle["undisturbed"].(float64) != restart["undisturbed"].(float64)+1 {
		t.Errorf("an idle device has lost connections: %v, and %v before", idle, restart)
	}
	after := statusOf(t, dev)
	for _, changes := range []string{"owner", "traffic", "holders", "remote", "restart"} {
		delete(before, changes)
		delete(after, changes)
	}
	if got, want := fmt.Sprint(after), fmt.Sprint(before); got != want {
		t.Errorf("the status is %s, and was %s", got, want)
	}
	// It heeds signals as the first process did.
	if n := ownerOf(t, dev); syscall.Kill(n, syscall.SIGHUP) != nil {
		t.Errorf("pid %d has gone", n)
	}
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
	awaitNoServer(t)
}

// keeperOf returns the keeper of a device; 0: there is none.
func keeperOf(t testing.TB, dev string) int {
	t.Helper()
	pid, _ := listed(t, dev)["restart"].(map[string]any)["pid"].(float64)
	return int(pid)
}

// TestKernelKeeper kills keepers: the serving process starts another one each time. When both are
// dead a file waits to be attached, and memory is lost.
func TestKernelKeeper(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise)
	nbdnltest.Identifiers.Need(t) // to attach
	image := filepath.Join(imageDir(t), "disk.img")
	dev := connected(t, "file", image, "--create", "--size", "8M", "--timeout", "2s", "--restart", "1000")
	load := verifiedLoad(t, dev)
	for range kills() {
		keeper := keeperOf(t, dev)
		if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { k := keeperOf(t, dev); return k != 0 && k != keeper }, "another keeper")
		pid := kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
		load.goesOn(writes(t, dev))
	}
	must(t, "upgrade", dev)
	pid := kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	load.goesOn(writes(t, dev))
	bothDie(t, dev)
	must(t, "attach", dev)
	load.goesOn(writes(t, dev))
	pid = kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	load.goesOn(writes(t, dev))
	load.stop()
	must(t, "disconnect", dev)

	dev = connected(t, "memory", "--size", "8M")
	bothDie(t, dev)
	if r := nbdctl(t, "attach", dev); !r.ended(exit.Failure, "what was in memory is lost") {
		t.Errorf("attach: %d, %s", r.code, r.stderr)
	}
	must(t, "disconnect", dev)
	awaitNoServer(t)
}

// bothDie kills the keeper of a device and the process that serves it.
func bothDie(t *testing.T, dev string) {
	t.Helper()
	pid, keeper := ownerOf(t, dev), keeperOf(t, dev)
	for _, p := range []int{pid, keeper} { // neither notices the end of the other
		if err := syscall.Kill(p, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []int{keeper, pid} {
		if err := syscall.Kill(p, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
}

// TestKernelRestartFails kills a process while something is wrong with the one that is to take its
// place: another one does when that is over, and the memory still has every byte.
func TestKernelRestartFails(t *testing.T) {
	requireKernel(t, lostNoise)
	said := filepath.Join(t.TempDir(), "fate")
	t.Setenv(inheriting, said)
	dev := connected(t, "fragile", "--size", "64M", "--timeout", "2s", "--restart", "1000", "--dead-timeout", "1h")
	log := statusOf(t, dev)["log"].(string)
	load := verifiedLoad(t, dev)
	failures := func() int { return strings.Count(sh(t, "cat "+log), "no process has taken its place") }
	for _, fate := range []string{"fails", "panics", "exits", "is killed", "is shorter"} {
		if err := os.WriteFile(said, []byte(fate), 0o600); err != nil {
			t.Fatal(err)
		}
		before, pid := failures(), kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return failures() > before }, "a failure")
		// While the next process tries, it counts as one that serves.
		eventually(t, func() bool { return listed(t, dev)["state"] == "waiting" }, "%s waiting: %s", dev, fate)
		if err := os.Remove(said); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
		load.goesOn(writes(t, dev))
	}
	load.stop()
	must(t, "disconnect", dev)
	awaitNoServer(t)
}

// TestKernelRestartEnds has a process die more often than it is replaced. The device ends then:
// what waits for it fails at once, its index is free, and lists say why until they are told not to.
func TestKernelRestartEnds(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise)
	nbdnltest.Identifiers.Need(t) // Linux 5.10 has a request wait for its dead timeout all the same.
	image := filepath.Join(imageDir(t), "disk.img")
	dev := connected(t, "file", image, "--create", "--size", "8M", "--timeout", "2s", "--restart", "2",
		"--dead-timeout", "1h", "--name", "weak")
	for range 2 {
		pid := kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	}
	hold, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	kill(t, dev, syscall.SIGKILL)
	// The dead timeout of an hour is not waited for.
	if r := finish(t, command(t, "dd", "if="+dev, "iflag=direct", "bs=4k", "count=1", "of=/dev/null")); r.code == 0 {
		t.Error("something is read from a device that nobody serves")
	}
	gaveUp := func() any { return listed(t, dev)["restart"].(map[string]any)["gave_up"] }
	eventually(t, func() bool { return gaveUp() != nil }, "the reason")
	const reason = "the process that serves it has died 3 times within 10m"
	if l := nbdctl(t, "list"); !containsAll(l.stderr, reason, "is orphaned") {
		t.Errorf("list does not say why, while it is held: %s", l.stderr)
	}
	hold.Close()
	eventually(t, func() bool { return listed(t, dev)["state"] == "ended" }, "the end of %s", dev)
	awaitNoServer(t)
	if l := nbdctl(t, "list"); !containsAll(l.stdout+l.stderr, "ended", "weak", reason, "nbdctl disconnect") {
		t.Errorf("list does not say why: %s%s", l.stdout, l.stderr)
	}
	for _, command := range []string{"status", "attach", "upgrade"} {
		if r := nbdctl(t, command, dev); !r.ended(exit.NotFound, reason) {
			t.Errorf("%s: %d, %s", command, r.code, r.stderr)
		}
	}
	// Another connect does not take the reason away, unless it takes the index.
	other := connected(t, "memory", "--size", "1M", "--device", "nbd9")
	if d := listed(t, dev); d == nil || d["label"] != "weak" || gaveUp() == nil {
		t.Errorf("the device is %v", d)
	}
	must(t, "disconnect", other)
	again := connected(t, "file", image, "--device", dev, "--name", "weak")
	if d := listed(t, again); d["state"] != "live" || gaveUp() != nil {
		t.Errorf("the device is %v", d)
	}
	must(t, "disconnect", "weak")
	if d := listed(t, dev); d != nil {
		t.Errorf("what the index was used for before is listed again: %v", d)
	}
	awaitNoServer(t)
}

// TestKernelRestartNo has nobody take the place of a process that dies.
func TestKernelRestartNo(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise)
	dev := connected(t, "memory", "--size", "1M", "--restart", "no")
	if d := listed(t, dev); d["dead_timeout"] != 0.0 || keeperOf(t, dev) != 0 {
		t.Errorf("the device is %v", d)
	}
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	must(t, "disconnect", dev)
	awaitNoServer(t)
}
