package main

import (
	"errors"
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

const (
	// afterEnd is what the kernel says of requests that are under way, or come, when a device that
	// was connected by ioctls ends. Nobody cuts them off while the process is stopped: then they
	// end when they time out. Replies that are in the socket at the end are read after
	// nbd_clear_que has failed their requests, and are no news (nbd_handle_reply).
	afterEnd = `I/O error|beyond EOD|Dead connection|timed out|` +
		`Unexpected reply \(|Suspicious reply|Command already handled|no io inflight|` +
		`Receive control failed|Send control failed|Request send failed|Send disconnect failed|` +
		`Attempted send on invalid socket`
	fileSystemLost = `EXT4-fs|JBD2|Aborting journal`
)

// TestKernelIoctlKilled kills the serving process while fio runs: with it goes
// the device, and all I/O to it fails. The index can be used again.
func TestKernelIoctlKilled(t *testing.T) {
	requireKernel(t, afterEnd)
	dev := connected(t, "--ioctl", "memory", "--size", "64M")
	fio := fioLoad(t, dev)
	ended := make(chan result, 1)
	before := writes(t, dev) // of former users of the index
	go func() { ended <- finish(t, fio) }()
	eventually(t, func() bool { return writes(t, dev) > before+200 }, "traffic")
	kill(t, dev, syscall.SIGKILL)
	killed := time.Now()
	r := <-ended
	if r.code == 0 || !strings.Contains(r.stdout+r.stderr, "Input/output error") {
		t.Errorf("fio: code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Logf("I/O failed %s after the kill", time.Since(killed).Round(time.Millisecond))
	eventually(t, func() bool { return listed(t, dev) == nil }, "the end of %s", dev)
	if size := sysfs(t, dev, "size"); size != "0" {
		t.Errorf("the size is %s", size)
	}
	again := connected(t, "--ioctl", "memory", "--size", "1M", "--device", dev)
	sh(t, "dd if=/dev/zero of="+again+" bs=4k count=1 oflag=direct status=none")
	must(t, "disconnect", again)
}

// TestKernelIoctlKilledHeld shows that a mounted device whose process was
// killed is named as the orphan that it is until it is unmounted.
func TestKernelIoctlKilledHeld(t *testing.T) {
	requireKernel(t, afterEnd, fileSystemLost)
	dev := connected(t, "--ioctl", "memory", "--size", "64M", "--name", "dead")
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { d := listed(t, dev); return d != nil && d["state"] == "orphaned" }, "%s orphaned", dev)
	if r := nbdctl(t, "disconnect", "dead"); r.code != int(exit.Busy) || !strings.Contains(r.stderr, "mount") {
		t.Errorf("disconnect: code %d, %s", r.code, r.stderr)
	}
	sh(t, "umount "+mnt)
	eventually(t, func() bool { return listed(t, dev) == nil }, "%s free", dev)
	must(t, "disconnect", connected(t, "memory", "--size", "1M", "--device", dev, "--name", "dead"))
}

// TestKernelIoctlStopped shows what a stop of the serving process does: the
// kernel takes it for the end, nothing hangs, and the process ends when it goes on.
func TestKernelIoctlStopped(t *testing.T) {
	requireKernel(t, afterEnd)
	dev := connected(t, "--ioctl", "memory", "--size", "64M")
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	pid := kill(t, dev, syscall.SIGSTOP)
	// Each time another page: one that is read just before the stop takes effect is there for ever.
	page := int64(0)
	eventually(t, func() bool {
		page += 257 // beyond what is read ahead
		_, err := holder.ReadAt(make([]byte, 4096), page%(64<<8)<<12)
		return errors.Is(err, syscall.EIO)
	}, "an I/O error")
	holder.Close()
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(serving(t, os.Getenv("NBDCTL_STATE_DIR"))) == 0 }, "the end of pid %d", pid)
	if d := listed(t, dev); d != nil {
		t.Errorf("list shows %v", d)
	}
}

// TestKernelIoctlStoppedShown shows that a device whose process is stopped is named as the orphan
// that it is, and that a disconnect, which can't free it, says so and tells of no loss.
func TestKernelIoctlStoppedShown(t *testing.T) {
	requireKernel(t, afterEnd)
	dev := connected(t, "--ioctl", "memory", "--size", "64M", "--timeout", "2s")
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	pid := kill(t, dev, syscall.SIGSTOP)
	advice := []string{fmt.Sprintf("pid %d, which serves it, is stopped", pid), "nbdctl kick " + filepath.Base(dev)}
	// While somebody has it open, the kernel shows its size as before; then none.
	for _, closed := range []bool{false, true} {
		if closed {
			holder.Close()
		}
		orphaned := func() bool { return listed(t, dev)["state"] == "orphaned" }
		eventually(t, orphaned, "%s orphaned, closed %t", dev, closed)
		if d := statusOf(t, dev); d["connections_alive"] != 0.0 || d["state"] != "orphaned" {
			t.Errorf("closed %t: status shows %v", closed, d)
		}
		if r := nbdctl(t, "list"); !r.ended(exit.OK, advice...) {
			t.Errorf("closed %t: list says %q", closed, r.stderr)
		}
		if out := must(t, "status", dev); !containsAll(out, advice...) {
			t.Errorf("closed %t: status shows\n%s", closed, out)
		}
	}
	r := nbdctl(t, "disconnect", dev)
	if !r.ended(exit.Busy, advice...) || strings.Contains(r.stderr, "written") {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	must(t, "kick", dev)
	if d := listed(t, dev); d != nil {
		t.Errorf("list shows %v", d)
	}
	awaitNoServer(t)
}

// TestKernelIoctlHeld shows that a device is disconnected in order: not while it
// is mounted, by force nonetheless, and that its own process holds it for nobody.
func TestKernelIoctlHeld(t *testing.T) {
	requireKernel(t, afterEnd, fileSystemLost)
	dev := connected(t, "--ioctl", "memory", "--size", "64M", "--name", "held")
	if holders := statusOf(t, dev)["holders"].([]any); len(holders) != 0 {
		t.Errorf("holders of an unused device are %v", holders)
	}
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	r := nbdctl(t, "disconnect", "held")
	if r.code != int(exit.Busy) || !strings.Contains(r.stderr, "by mount of") || strings.Contains(r.stderr, "process") {
		t.Errorf("disconnect: code %d, %q", r.code, r.stderr)
	}
	sh(t, "echo alive >"+mnt+"/file; sync")
	r = nbdctl(t, "disconnect", "--force", "held")
	if r.code != 0 || !strings.Contains(r.stderr, "mount") {
		t.Errorf("forced: code %d, %q", r.code, r.stderr)
	}
	if d := listed(t, dev); d == nil || d["state"] != "disconnecting" {
		t.Errorf("list shows %v, want it disconnecting", d)
	}
	sh(t, "umount "+mnt)
	eventually(t, func() bool { return listed(t, dev) == nil }, "%s free", dev)
	awaitNoServer(t)
}

// TestKernelIoctlChanges shows what can be changed in a device connected by
// ioctls, and that the rest is refused with its reason.
func TestKernelIoctlChanges(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "--ioctl", "memory", "--size", "64M")
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	must(t, "resize", dev, "128M")
	sh(t, "resize2fs "+dev+" 2>/dev/null; head -c 80000000 /dev/urandom >"+mnt+"/data; sync; umount "+mnt)
	sh(t, "fsck.ext4 -fn "+dev)
	if r := nbdctl(t, "resize", dev, "32M"); r.code != 0 {
		t.Errorf("shrinking: code %d, %s", r.code, r.stderr)
	}
	if size := sysfs(t, dev, "size"); size != "65536" {
		t.Errorf("the size is %s sectors, want 65536", size)
	}
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if r := nbdctl(t, "resize", dev, "16M"); !r.ended(exit.Busy, fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("shrinking what is open: code %d, %q", r.code, r.stderr)
	}
	holder.Close()
	must(t, "reconfigure", dev, "--timeout", "12s")
	if got := sysfs(t, dev, "queue/io_timeout"); got != "12000" {
		t.Errorf("the timeout is %s ms", got)
	}
	r := nbdctl(t, "reconfigure", dev, "--dead-timeout", "5s")
	if r.code != int(exit.Unsupported) || !strings.Contains(r.stderr, "ioctl") {
		t.Errorf("reconfigure: code %d, %q", r.code, r.stderr)
	}
	d := statusOf(t, dev)
	for key, want := range map[string]any{"state": "live", "timeout": 12.0, "dead_timeout": 0.0, "identifier": nil} {
		if d[key] != want {
			t.Errorf("status says %s: %v, want %v", key, d[key], want)
		}
	}
	must(t, "disconnect", dev)
}

// TestKernelIoctlKicked shows that stuck I/O ends.
func TestKernelIoctlKicked(t *testing.T) {
	requireKernel(t, afterEnd)
	dev := connected(t, "--ioctl", "memory", "--size", "64M")
	must(t, "kick", dev)
	if d := listed(t, dev); d != nil {
		t.Errorf("list shows %v", d)
	}
}

// TestKernelSideBySide has a device by netlink, one by ioctls, and a stranger's
// of each: each is shown as what it is, and only ours go.
func TestKernelSideBySide(t *testing.T) {
	requireKernel(t)
	byNetlink, byIoctl := connected(t, "memory", "--size", "16M"), connected(t, "--ioctl", "memory", "--size", "16M")
	strangers := stranger(t)
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 1M "+image+"; qemu-nbd --fork -f raw -c /dev/nbd7 "+image)
	defer sh(t, "qemu-nbd -d /dev/nbd7 >/dev/null")
	eventually(t, func() bool { return listed(t, "/dev/nbd7") != nil }, "nbd7 connected by qemu-nbd")
	wants := map[string]string{
		byNetlink:   "netlink true",
		byIoctl:     "ioctl true",
		strangers:   "netlink false",
		"/dev/nbd7": "ioctl false",
	}
	if !nbdnltest.Identifiers.In(t) { // nor can be told how strangers' were connected
		wants[strangers], wants["/dev/nbd7"] = "<nil> false", "<nil> false"
	}
	for dev, want := range wants {
		d := listed(t, dev)
		if got := fmt.Sprint(d["mode"], " ", d["owner"].(map[string]any)["ours"]); got != want {
			t.Errorf("%s is %s, want %s", dev, got, want)
		}
	}
	for _, dev := range []string{byNetlink, byIoctl} {
		verify(t, dev, 8)
	}
	for _, dev := range []string{strangers, "/dev/nbd7"} {
		if r := nbdctl(t, "disconnect", dev); !r.ended(exit.Permission, "not ours") {
			t.Errorf("disconnect of %s: code %d, %q", dev, r.code, r.stderr)
		}
	}
	must(t, "disconnect", "--all", "--force")
	left := listJSON(t)
	if len(left) != 2 || listed(t, strangers) == nil || listed(t, "/dev/nbd7") == nil {
		t.Errorf("disconnect --all leaves %v, want the strangers'", left)
	}
}
