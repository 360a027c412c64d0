package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelLoss fills the disk below an image: the kernel acknowledges what it
// can't deliver then, tells one who syncs, and disconnects the device as if nothing
// had been.
func TestKernelLoss(t *testing.T) {
	requireKernel(t, "I/O error", "rite error", "EXT4-fs", "JBD2", "Other side returned error")
	for _, end := range []string{"disconnect", "foreground"} {
		t.Run(end, func(t *testing.T) {
			small := t.TempDir()
			sh(t, "mount -t tmpfs -o size=4m tmpfs "+small)
			defer sh(t, "umount -l "+small)
			args := []string{"connect", "file", filepath.Join(small, "disk.img"), "--create", "--size", "64M"}
			fg := nbdctlCommand(t, append(args, "--foreground")...)
			dev := ""
			var said lockedBuffer
			if end == "disconnect" {
				dev = connected(t, args[1:]...)
			} else {
				fg.Stdout, fg.Stderr = &said, &said
				if err := fg.Start(); err != nil {
					t.Fatal(err)
				}
				said.await(t, "/dev/nbd")
				dev = strings.TrimSpace(strings.SplitN(said.String()[strings.Index(said.String(), "/dev/nbd"):], "\n", 2)[0])
			}
			// Who syncs first is told, and the kernel tells nobody else.
			sh(t, "! dd if=/dev/urandom of="+dev+" bs=1M count=16 conv=fsync status=none")
			if end == "foreground" {
				interrupt(t, fg)
				if err := fg.Wait(); err == nil || fg.ProcessState.ExitCode() != int(exit.Failure) {
					t.Errorf("exit code %d: %v", fg.ProcessState.ExitCode(), err)
				}
				wantLoss(t, said.String())
				return
			}
			r := nbdctl(t, "disconnect", dev)
			if r.code != int(exit.Failure) || r.stdout != filepath.Base(dev)+" disconnected\n" {
				t.Errorf("exit code %d, %q", r.code, r.stdout)
			}
			wantLoss(t, r.stderr)
			if _, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/pid"); err == nil {
				t.Error("it is still connected")
			}
		})
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
