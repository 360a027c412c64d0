package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// lossNoise is what the kernel logs when it drops what a device did not take.
const lossNoise = `I/O error|rite error|EXT4-fs|JBD2|Other side returned error`

// smallDisk mounts a file system of 4 MiB.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	sh(t, "mount -t tmpfs -o size=4m tmpfs "+dir)
	t.Cleanup(func() { sh(t, "umount -l "+dir) })
	return dir
}

// lose writes 16 MiB to a device whose image lies on a full disk: the kernel acknowledges them,
// tries to write them when dd closes the device, and drops what fails. With a sync, dd itself is
// told; without one, nobody is.
func lose(t *testing.T, dev string, synced bool) {
	t.Helper()
	if synced {
		sh(t, "! dd if=/dev/urandom of="+dev+" bs=1M count=16 conv=fsync status=none")
	} else {
		sh(t, "dd if=/dev/urandom of="+dev+" bs=1M count=16 status=none")
	}
}

// TestKernelLoss fills the disk below an image: the kernel acknowledges what it can't deliver then,
// and drops it. The first disconnect tells that, whoever was told before, and ends the device, for
// keeping it would save nothing; a second one finds no device.
func TestKernelLoss(t *testing.T) {
	requireKernel(t, lossNoise)
	for _, tt := range []struct {
		name   string
		synced bool
		told   bool // before, by list and status
		args   func(dev string) []string
	}{
		{"synced", true, false, func(dev string) []string { return []string{"disconnect", dev} }},
		{"nobody told", false, false, func(dev string) []string { return []string{"disconnect", dev} }},
		{"told before", false, true, func(dev string) []string { return []string{"disconnect", dev} }},
		{"all", false, false, func(string) []string { return []string{"disconnect", "--all"} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			small := smallDisk(t)
			dev := connected(t, "file", filepath.Join(small, "disk.img"), "--create", "--size", "64M")
			if v := listed(t, dev); v["loss"] != nil {
				t.Errorf("before anything is written, list shows the loss %v", v["loss"])
			}
			lose(t, dev, tt.synced)
			sh(t, "mount -o remount,size=100m "+small) // There is space again, too late.
			if tt.told {
				eventually(t, func() bool { return listed(t, dev)["loss"] != nil }, "the loss in the list")
				for range 2 {
					wantLossShown(t, dev)
				}
			}
			r := nbdctl(t, tt.args(dev)...)
			if r.code != int(exit.Failure) || r.stdout != filepath.Base(dev)+" disconnected\n" {
				t.Errorf("exit code %d, %q", r.code, r.stdout)
			}
			wantLoss(t, r.stderr)
			if _, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/pid"); err == nil {
				t.Error("it is still connected")
			}
			if r := nbdctl(t, "disconnect", dev); r.code != int(exit.NotFound) {
				t.Errorf("a second disconnect: exit code %d, %s", r.code, r.stderr)
			}
		})
	}
}

// TestKernelLossHeld refuses a device in use, tells the loss all the same, and again when the
// device can be ended.
func TestKernelLossHeld(t *testing.T) {
	requireKernel(t, lossNoise)
	dev := connected(t, "file", filepath.Join(smallDisk(t), "disk.img"), "--create", "--size", "64M")
	lose(t, dev, false)
	holder, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r := nbdctl(t, "disconnect", dev)
		if r.code != int(exit.Busy) {
			t.Errorf("held: exit code %d", r.code)
		}
		wantLoss(t, r.stderr)
	}
	holder.Close()
	r := nbdctl(t, "disconnect", dev)
	if r.code != int(exit.Failure) || r.stdout != filepath.Base(dev)+" disconnected\n" {
		t.Errorf("exit code %d, %q", r.code, r.stdout)
	}
	wantLoss(t, r.stderr)
}

// TestKernelLossSignal ends the process by one signal, and it says what was lost.
func TestKernelLossSignal(t *testing.T) {
	requireKernel(t, lossNoise)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(s.String(), func(t *testing.T) {
			small := smallDisk(t)
			fg, said, dev := foreground(t, "file", filepath.Join(small, "disk.img"), "--create", "--size", "64M")
			lose(t, dev, false)
			sh(t, "mount -o remount,size=100m "+small)
			if err := fg.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			if err := fg.Wait(); err == nil || fg.ProcessState.ExitCode() != int(exit.Failure) {
				t.Errorf("exit code %d: %v", fg.ProcessState.ExitCode(), err)
			}
			wantLoss(t, said.String())
			if strings.Contains(said.String(), "goes on serving") {
				t.Errorf("it went on: %s", said.String())
			}
			if l := listed(t, dev); l != nil {
				t.Errorf("list shows %v", l)
			}
		})
	}
}

// foreground serves a device in the foreground.
func foreground(t *testing.T, args ...string) (fg *exec.Cmd, said *lockedBuffer, dev string) {
	t.Helper()
	fg, said = nbdctlCommand(t, append([]string{"connect", "--foreground"}, args...)...), new(lockedBuffer)
	fg.Stdout, fg.Stderr = said, said
	if err := fg.Start(); err != nil {
		t.Fatal(err)
	}
	said.await(t, "/dev/nbd")
	_, after, _ := strings.Cut(said.String(), "/dev/nbd")
	index, _, _ := strings.Cut(after, "\n")
	return fg, said, "/dev/nbd" + strings.TrimSpace(index)
}

// wantLossShown checks that list and status show the loss, to people and to scripts.
func wantLossShown(t *testing.T, dev string) {
	t.Helper()
	for _, v := range []map[string]any{listed(t, dev), statusOf(t, dev)} {
		loss, _ := v["loss"].(map[string]any)
		said, _ := loss["error"].(string)
		if !strings.Contains(said, "no space left on device") || loss["time"] == nil {
			t.Errorf("the loss is %v", v["loss"])
		}
	}
	l := nbdctl(t, "list")
	if !strings.Contains(l.stdout, "live,loss") || !strings.Contains(l.stderr, "no space left on device") {
		t.Errorf("list does not show it: %s%s", l.stdout, l.stderr)
	}
	if s := must(t, "status", dev); !strings.Contains(s, "loss") || !strings.Contains(s, "no space left on device") {
		t.Errorf("status does not show it: %s", s)
	}
}

// wantLoss checks that the user was told what was lost, and why.
func wantLoss(t *testing.T, said string) {
	t.Helper()
	for _, part := range []string{"did not reach the backend", "write", "no space left on device"} {
		if !strings.Contains(said, part) {
			t.Errorf("no %q in %s", part, said)
		}
	}
}
