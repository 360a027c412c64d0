package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// withSystemd is set in a machine within the lab's whose first process is systemd.
const withSystemd = "NBDCTL_TEST_SYSTEMD"

// bootSystemd has systemd be the first process of a pid namespace, with nothing to start.
const bootSystemd = `
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/system
printf '[Unit]\nDefaultDependencies=no\n' >/run/systemd/system/lab.target
exec env container=lab /lib/systemd/systemd --system --unit=lab.target --log-target=null
`

// underSystemd reports whether the first process here is systemd. If not, it has the test run where
// it is, and fails if that does.
func underSystemd(t *testing.T) bool {
	t.Helper()
	if os.Getenv(withSystemd) != "" {
		return true
	}
	requireKernel(t, lostNoise, orphanNoise)
	boot := commandFor(t, time.Hour, "unshare", "--pid", "--fork", "--kill-child", "--mount", "--cgroup",
		"sh", "-ec", bootSystemd)
	ended := begin(t, boot)
	t.Cleanup(func() {
		_ = boot.Process.Kill()
		<-ended
	})
	var first string
	inside := func(args ...string) *exec.Cmd {
		enter := []string{"--target", first, "--mount", "--pid", "--cgroup", "--"}
		return commandFor(t, time.Hour, "nsenter", append(enter, args...)...)
	}
	eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", boot.Process.Pid))
		first = strings.TrimSpace(string(b))
		return err == nil && first != "" &&
			finish(t, inside("systemctl", "is-active", "--quiet", "lab.target")).code == 0
	}, "systemd")
	again := inside(executable(t), "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "1h")
	again.Env = append(os.Environ(), withSystemd+"=1")
	r := finish(t, again)
	t.Logf("with systemd:\n%s%s", r.stdout, r.stderr)
	if r.code != 0 || !strings.Contains(r.stdout, "--- PASS: "+t.Name()) {
		t.Errorf("exit code %d", r.code)
	}
	return false
}

// executable is the path of the test.
func executable(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// unitOf is the unit of the keeper of a device; "": there is none.
func unitOf(t testing.TB, dev string) string {
	t.Helper()
	unit, _ := listed(t, dev)["restart"].(map[string]any)["unit"].(string)
	return unit
}

// units are those of nbdctl that systemd has.
func units(t *testing.T) string {
	t.Helper()
	return sh(t, "systemctl list-units --all --plain --no-legend 'nbdctl-*'")
}

// awaitNoUnit waits until systemd has none of them any more.
func awaitNoUnit(t *testing.T) {
	t.Helper()
	awaitNoServer(t)
	eventually(t, func() bool { return units(t) == "" }, "the end of units")
}

// TestKernelSystemdRestart kills serving processes, their keepers, and both at once, under load:
// with systemd no request fails, no byte is wrong, and memory keeps every one.
func TestKernelSystemdRestart(t *testing.T) {
	if !underSystemd(t) {
		return
	}
	requireKernel(t, lostNoise)
	image := filepath.Join(imageDir(t), "disk.img")
	for _, args := range [][]string{{"memory", "--size", "64M"}, {"file", image, "--create", "--size", "64M"}} {
		dev := connected(t, append(args, "--timeout", "2s", "--restart", "1000")...)
		pid, keeper, unit := ownerOf(t, dev), keeperOf(t, dev), unitOf(t, dev)
		for _, p := range []int{pid, keeper} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p))
			if err != nil || !strings.HasPrefix(string(b), "0::/system.slice/nbdctl-") {
				t.Errorf("pid %d is in %s, %v", p, b, err)
			}
		}
		if s := must(t, "status", dev); !strings.Contains(s, "by systemd ("+unit+", pid "+strconv.Itoa(keeper)) {
			t.Errorf("status: %s", s)
		}
		load := verifiedLoad(t, dev)
		var took times
		for n := range kills() {
			begin, pid := time.Now(), ownerOf(t, dev)
			which := []string{"the process", "the keeper", "both"}[n%3]
			switch which {
			case "the process":
				kill(t, dev, syscall.SIGKILL)
			case "the keeper":
				keeper := keeperOf(t, dev)
				if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				eventually(t, func() bool { k := keeperOf(t, dev); return k != 0 && k != keeper }, "another keeper")
			case "both":
				killBoth(t, dev)
			}
			if which != "the keeper" {
				eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process, after %s", which)
				took = append(took, time.Since(begin))
			}
			eventually(t, func() bool { return unitOf(t, dev) != "" && listed(t, dev)["state"] == "live" }, "a keeper")
			load.goesOn(writes(t, dev))
		}
		load.stop()
		t.Logf("%s: another process serves after %v", args[0], took)
		n, err := strconv.Atoi(strings.TrimSpace(sh(t, "systemctl show -P NFileDescriptorStore "+unitOf(t, dev))))
		if err != nil || n < 4 { // the document, the control socket, a connection, the ledger
			t.Errorf("systemd has %d descriptors of %s, %v", n, unitOf(t, dev), err)
		}
		must(t, "disconnect", dev)
		awaitNoUnit(t)
	}
}

// killBoth kills the keeper of a device and the process that serves it, neither of which notices
// the end of the other.
func killBoth(t *testing.T, dev string) {
	t.Helper()
	both := []int{keeperOf(t, dev), ownerOf(t, dev)}
	for _, s := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, p := range both {
			if err := syscall.Kill(p, s); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestKernelSystemdUnits holds which units there are, and that none stays: after an upgrade, an
// attach, a stop, the end of the login, and a connect that has failed.
func TestKernelSystemdUnits(t *testing.T) {
	if !underSystemd(t) {
		return
	}
	requireKernel(t, lostNoise, orphanNoise)
	count := func(services, scopes int) {
		t.Helper()
		eventually(t, func() bool {
			u := units(t)
			return strings.Count(u, ".service ") == services && strings.Count(u, ".scope ") == scopes
		}, "%d services and %d scopes", services, scopes)
	}
	image := filepath.Join(imageDir(t), "disk.img")
	if r := nbdctl(t, "connect", "file", "/nowhere"); r.code == 0 {
		t.Errorf("connected to nothing")
	}
	count(0, 0)

	dev := connected(t, "memory", "--size", "1M", "--restart", "no")
	count(0, 1)
	must(t, "disconnect", dev)
	count(0, 0)

	dev = connected(t, "file", image, "--create", "--size", "8M", "--timeout", "2s", "--restart", "2",
		"--dead-timeout", "1h")
	count(1, 1)
	before := unitOf(t, dev)
	must(t, "upgrade", dev)
	count(1, 1)
	if now := unitOf(t, dev); now == before || now == "" {
		t.Errorf("the unit was %s, and is %s", before, now)
	}
	for range 2 { // It dies too often.
		pid := kill(t, dev, syscall.SIGKILL)
		eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	}
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "ended" }, "the end of %s", dev)
	count(0, 0)
	if l := nbdctl(t, "list"); !strings.Contains(l.stderr, "has died 3 times within 10m") {
		t.Errorf("list does not say why: %s", l.stderr)
	}
	must(t, "disconnect", dev)

	dev = connected(t, "file", image, "--timeout", "2s", "--dead-timeout", "1h", "--restart", "1")
	count(1, 1)

	// One that is in use is not ended, and has a keeper again.
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	pid, unit := ownerOf(t, dev), unitOf(t, dev)
	sh(t, "systemctl stop "+unit)
	eventually(t, func() bool { u := unitOf(t, dev); return u != unit && u != "" }, "another unit")
	if now := ownerOf(t, dev); now != pid {
		t.Errorf("pid %d serves, and pid %d did", now, pid)
	}
	sh(t, "umount "+mnt)
	sh(t, "systemctl stop "+unitOf(t, dev))
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of the device")
	awaitNoUnit(t)

	// A login that ends takes along what it has started, and nothing else.
	sh(t, runAsNbdctl+"=1 systemd-run --quiet --scope --slice=user.slice --unit=login "+executable(t)+
		" connect --size 1M memory >"+mnt+"/dev")
	dev = strings.TrimSpace(sh(t, "cat "+mnt+"/dev"))
	pid = ownerOf(t, dev)
	sh(t, "systemctl stop login.scope 2>/dev/null || :")
	sh(t, "dd if="+dev+" iflag=direct bs=4k count=1 of=/dev/null status=none")
	if now := ownerOf(t, dev); now != pid {
		t.Errorf("pid %d serves, and pid %d did", now, pid)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !strings.HasPrefix(string(b), "0::/system.slice/nbdctl-") {
		t.Errorf("pid %d is in %s, %v", pid, b, err)
	}
	must(t, "disconnect", dev)
	awaitNoUnit(t)
}
