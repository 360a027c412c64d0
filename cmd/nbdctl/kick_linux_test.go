package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// kickNoise are the lines of the kernel's log that stuck and failed requests leave.
const kickNoise = `I/O error|Connection timed out|Dead connection|Receive control failed|Send control failed|` +
	`Send disconnect failed|Request send failed|shutting down sockets|timed out|Send data failed|` +
	`Attempted send on invalid socket|Possible stuck request`

// begin starts cmd, and returns where its result comes.
func begin(t *testing.T, cmd *exec.Cmd) <-chan result {
	t.Helper()
	var stdout, stderr lockedBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan result, 1)
	go func() {
		_ = cmd.Wait() // its exit code says it
		ended <- result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	}()
	return ended
}

// stuckReader starts a read of dev that hangs, and returns where its result comes.
func stuckReader(t *testing.T, dev string) <-chan result {
	t.Helper()
	// Not where the partition scan has read, which may be cached.
	ended := begin(t, command(t, "dd", "if="+dev, "of=/dev/null", "bs=4k", "count=1", "skip=500", "iflag=direct"))
	eventually(t, func() bool { return hasInFlight(t, dev) }, "the read to hang")
	return ended
}

// hasInFlight tells whether the kernel waits for the end of any request to dev.
func hasInFlight(t *testing.T, dev string) bool {
	t.Helper()
	return strings.Join(strings.Fields(sysfs(t, dev, "inflight")), " ") != "0 0"
}

// kicked kicks dev and holds that the reader then fails, all in bounded time.
func kicked(t *testing.T, dev string, reader <-chan result, within time.Duration) result {
	t.Helper()
	start := time.Now()
	r := nbdctl(t, "kick", dev)
	if r.code != 0 {
		t.Fatalf("kick: code %d, %s", r.code, r.stderr)
	}
	if got := <-reader; got.code == 0 || !strings.Contains(got.stderr, "Input/output error") {
		t.Errorf("the reader: code %d, %s", got.code, got.stderr)
	}
	took := time.Since(start)
	t.Logf("unstuck after %s", took.Round(time.Millisecond))
	if took > within {
		t.Errorf("it took %s, at most %s would be well", took, within)
	}
	if d := listed(t, dev); d != nil {
		t.Errorf("list shows %v", d)
	}
	return r
}

// TestKernelKickStopped kicks a device whose serving process is stopped.
func TestKernelKickStopped(t *testing.T) {
	requireKernel(t, kickNoise)
	dev := connected(t, "memory", "--size", "64M", "--timeout", "1h")
	kill(t, dev, syscall.SIGSTOP)
	kicked(t, dev, stuckReader(t, dev), 20*time.Second)
}

// TestKernelKickBackend kicks a device whose backend never answers: its image
// is a suspended mapping, so the process hangs where not even SIGKILL reaches it.
func TestKernelKickBackend(t *testing.T) {
	requireKernel(t, kickNoise)
	sh(t, "modprobe -q dm-mod || true; dmsetup create --noudevsync stuck --table '0 8192 zero'; dmsetup mknodes")
	defer sh(t, "dmsetup remove --noudevsync stuck")
	dev := connected(t, "file", "/dev/mapper/stuck", "--timeout", "1h", "--read-only")
	sh(t, "dmsetup suspend stuck")
	reader := stuckReader(t, dev)
	r := kicked(t, dev, reader, 30*time.Second)
	if !strings.Contains(r.stderr, "it ends when its backend lets it") {
		t.Errorf("kick does not say what stays: %q", r.stderr)
	}
	sh(t, "dmsetup resume stuck")
	eventually(t, func() bool { return len(serving(t, os.Getenv("NBDCTL_STATE_DIR"))) == 0 }, "the end of the process")
}

// TestKernelKickOrphan kicks a device whose process was killed, and whose
// requests wait for another one.
func TestKernelKickOrphan(t *testing.T) {
	requireKernel(t, kickNoise)
	nbdnltest.Waking.Need(t)
	dev := connected(t, "memory", "--size", "64M", "--timeout", "1h", "--dead-timeout", "1h",
		"--restart", "no")
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	dd := command(t, "dd", "if="+dev, "of=/dev/null", "bs=4k", "count=1", "skip=500", "iflag=direct")
	ended := begin(t, dd)
	// On a device that nobody serves it waits before it is in flight: in nbd_queue_rq itself, for a
	// worker of the kernel that is there, or in the open.
	hangs(t, dd.Process.Pid, ended, "nbd_queue_rq", "submit_bio_wait", "io_schedule", "bdev_open")
	kicked(t, dev, ended, 20*time.Second)
}

// TestKernelKickDisconnect kicks a device on which a forced disconnect hangs in
// the kernel, and all of generic netlink with it, because the server has
// stopped and its socket is full.
func TestKernelKickDisconnect(t *testing.T) {
	requireKernel(t, kickNoise)
	dev := connected(t, "memory", "--size", "64M", "--timeout", "1h")
	kill(t, dev, syscall.SIGSTOP)
	// More than a socket holds, also where it is given much room (Linux 6.12), in requests of 1 MiB
	// at once.
	writer := begin(t, command(t, "dd", "if=/dev/zero", "of="+dev, "bs=32M", "count=1", "oflag=direct"))
	before, since := "", time.Now()
	eventually(t, func() bool {
		now := strings.TrimSpace(sysfs(t, dev, "inflight"))
		if now != before {
			before, since = now, time.Now()
		}
		return now != "0        0" && time.Since(since) > 200*time.Millisecond
	}, "the write to hang")
	hung := nbdctlCommand(t, "disconnect", "--force", dev)
	disconnect := begin(t, hung)
	hangs(t, hung.Process.Pid, disconnect, "nbd_")
	// Who only looks is not drawn in: it ends, and soon.
	looked := time.Now()
	if d := listed(t, dev); d == nil || d["state"] != "live" {
		t.Errorf("list shows %v", d)
	}
	if took := time.Since(looked); took > 5*time.Second {
		t.Errorf("list took %s", took)
	}
	kicked(t, dev, writer, 40*time.Second)
	<-disconnect
}
