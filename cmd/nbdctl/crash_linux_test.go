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

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelKilled kills the serving process while fio runs: I/O fails within
// the timeouts, list says what happened, disconnect cleans up, and the index
// can be used again.
func TestKernelKilled(t *testing.T) {
	requireKernel(t, `I/O error|Connection timed out|Dead connection|Receive control failed|shutting down sockets`,
		`Send control failed|Request send failed|Attempted send on invalid socket|Possible stuck request`,
		`timed out|Send disconnect failed`)
	const timeout = 2 * time.Second
	dev := connected(t, "memory", "--size", "64M", "--timeout", "2s", "--restart", "no")
	pid := int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64))

	fio := fioLoad(t, dev)
	before := writes(t, dev) // of former users of the index
	ended := make(chan result, 1)
	go func() { ended <- finish(t, fio) }()
	eventually(t, func() bool { return writes(t, dev) > before+200 }, "traffic")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	r := <-ended
	took := time.Since(killed)
	if r.code == 0 || !strings.Contains(r.stdout+r.stderr, "Input/output error") {
		t.Errorf("fio: code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	// The kernel's timers add up to about a second, twice.
	if took > timeout+5*time.Second {
		t.Errorf("I/O hung for %s, the timeout is %s", took, timeout)
	}
	t.Logf("I/O failed %s after the kill, at a timeout of %s", took.Round(time.Millisecond), timeout)

	d := listed(t, dev)
	if d == nil || d["state"] != "orphaned" || d["owner"].(map[string]any)["ours"] != true {
		t.Errorf("list shows %v, want it orphaned and ours", d)
	}
	l := nbdctl(t, "list")
	if !containsAll(l.stderr, "orphaned", fmt.Sprint(pid), "nbdctl disconnect") {
		t.Errorf("list does not explain: %q", l.stderr)
	}
	must(t, "disconnect", dev)
	again := connected(t, "memory", "--size", "1M", "--device", dev)
	sh(t, "dd if=/dev/zero of="+again+" bs=4k count=1 oflag=direct status=none")
	must(t, "disconnect", again)
}

// TestKernelOrphanPatient frees an orphan whose requests wait for a new connection,
// the flush of disconnect itself among them.
func TestKernelOrphanPatient(t *testing.T) {
	requireKernel(t, kickNoise)
	nbdnltest.Waking.Need(t)
	dev := connected(t, "memory", "--size", "64M", "--dead-timeout", "1h", "--restart", "no")
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	begin := time.Now()
	must(t, "disconnect", dev)
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	if l := listed(t, dev); l != nil {
		t.Errorf("list shows %v", l)
	}
}

// TestKernelNameAgain shows that the name of an orphan is free, and leads to who
// has taken it then.
func TestKernelNameAgain(t *testing.T) {
	requireKernel(t, `I/O error|Connection timed out|Dead connection|Send disconnect failed|Receive control failed`)
	orphan := connected(t, "memory", "--size", "1M", "--name", "again", "--restart", "no")
	kill(t, orphan, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, orphan)["state"] == "orphaned" }, "%s orphaned", orphan)
	heir := connected(t, "memory", "--size", "2M", "--name", "again")
	if out := strings.TrimSpace(must(t, "disconnect", "again")); out != filepath.Base(heir)+" disconnected" {
		t.Errorf("disconnect says %q, want it of %s", out, heir)
	}
	if l := listed(t, orphan); l == nil || l["state"] != "orphaned" {
		t.Errorf("list shows %v, want %s orphaned", l, orphan)
	}
	must(t, "disconnect", "again") // which is the orphan now
	if l := listed(t, orphan); l != nil {
		t.Errorf("list shows %v", l)
	}
}

// TestKernelOrphanHeld shows that even an orphan is not taken from its users.
func TestKernelOrphanHeld(t *testing.T) {
	requireKernel(t, fileSystemLost,
		`I/O error|Connection timed out|Dead connection|Send disconnect failed|Receive control failed`)
	dev := connected(t, "memory", "--size", "64M", "--timeout", "2s", "--restart", "no")
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	if r := nbdctl(t, "disconnect", dev); r.code != int(exit.Busy) || !strings.Contains(r.stderr, "mount") {
		t.Errorf("disconnect: code %d, %s", r.code, r.stderr)
	}
	sh(t, "umount -l "+mnt)
	must(t, "disconnect", dev)
}

// TestKernelStopped shows that a serving process that hangs hangs no command:
// list and status answer, and a forced disconnect says what is left.
func TestKernelStopped(t *testing.T) {
	requireKernel(t, `I/O error|Connection timed out|Dead connection|Send disconnect failed|Receive control failed`,
		`timed out|Request send failed`)
	dev := connected(t, "memory", "--size", "64M", "--timeout", "2s")
	pid := kill(t, dev, syscall.SIGSTOP)
	if d := statusOf(t, dev); d["traffic"] != nil {
		t.Errorf("status has traffic of a process that can't answer: %v", d)
	}
	if out := must(t, "status", dev); !containsAll(out, "does not answer", "nbdctl kick") {
		t.Errorf("status does not say so:\n%s", out)
	}
	start := time.Now()
	r := nbdctl(t, "disconnect", "--force", dev)
	if took := time.Since(start); took > time.Minute {
		t.Errorf("disconnect took %s", took)
	}
	if r.code != int(exit.Failure) || !strings.Contains(r.stderr, "is disconnected, but pid "+strconv.Itoa(pid)) {
		t.Errorf("disconnect: code %d, %s", r.code, r.stderr)
	}
	if d := listed(t, dev); d != nil {
		t.Errorf("list shows %v", d)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(serving(t, os.Getenv("NBDCTL_STATE_DIR"))) == 0 }, "the end of pid %d", pid)
}

// kill sends a signal to the process that serves dev, and returns its number.
func kill(t *testing.T, dev string, s syscall.Signal) int {
	t.Helper()
	pid := int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64))
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
	if s == syscall.SIGSTOP {
		// A process that stays stopped could neither end nor let go of its device. It may have
		// gone.
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) })
	}
	return pid
}

// TestKernelStateLost shows that a device is known as ours, and can be
// disconnected, after the state directory was wiped.
func TestKernelStateLost(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "1M")
	sh(t, "rm -r $NBDCTL_STATE_DIR/*")
	known := nbdnltest.Identifiers.In(t) // where the kernel keeps none, nothing else is left to know it by
	if d := listed(t, dev); d["state"] != "live" || d["owner"].(map[string]any)["ours"] != known {
		t.Errorf("list shows %v", d)
	}
	if known {
		must(t, "disconnect", dev)
	} else {
		must(t, "disconnect", "--force", dev)
	}
	awaitNoServer(t)
}

// TestKernelTerminated shows that SIGTERM ends a serving process whose device
// nobody holds, data flushed, and not one whose device is mounted.
func TestKernelTerminated(t *testing.T) { terminated(t) }

// TestKernelIoctlTerminated is the same for a device that was connected by ioctls.
func TestKernelIoctlTerminated(t *testing.T) { terminated(t, "--ioctl") }

func terminated(t *testing.T, flags ...string) {
	requireKernel(t)
	dev := connected(t, append(flags, "memory", "--size", "64M", "--name", "terminated")...)
	pid := int(listed(t, dev)["owner"].(map[string]any)["pid"].(float64))
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	log := statusOf(t, dev)["log"].(string)
	refused := func() bool { return strings.Contains(sh(t, "cat "+log), "goes on serving") }
	eventually(t, refused, "the refusal in the log")
	sh(t, "echo alive >"+mnt+"/file; sync; umount "+mnt)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of %s", dev)
	awaitNoServer(t)
}

// fioLoad prepares a load of small writes that ends only with the device.
func fioLoad(t *testing.T, dev string) *exec.Cmd {
	t.Helper()
	return command(t, "fio", "--name=load", "--filename="+dev, "--size=64M", "--minimal",
		"--ioengine=libaio", "--direct=1", "--iodepth=32", "--rw=randwrite", "--bs=4k",
		"--time_based", "--runtime=100")
}

// writes is the number of write requests that the device has completed.
func writes(t testing.TB, dev string) (n int) {
	t.Helper()
	var reads, merged, sectors, ms int
	if _, err := fmt.Sscan(sysfs(t, dev, "stat"), &reads, &merged, &sectors, &ms, &n); err != nil {
		t.Fatal(err)
	}
	return n
}
