package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// TestKernelUpgradeBeside upgrades a device while other commands change it, and upgrade it, too:
// each does what it is asked for, whichever process serves when it comes.
func TestKernelUpgradeBeside(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "64M", "--name", "beside")
	load := verifiedLoad(t, dev)
	for round := range upgrades() {
		before := writes(t, dev)
		size, timeout := 80+round, 40+round
		var all []<-chan result
		commands := [][]string{
			{"upgrade", dev}, {"resize", dev, fmt.Sprint(size, "M")}, {"upgrade", "beside"}, {"stats", dev},
			{"reconfigure", dev, "--timeout", fmt.Sprint(timeout, "s")}, {"upgrade", "--all"},
		}
		for _, args := range commands {
			all = append(all, begin(t, nbdctlCommand(t, args...)))
		}
		for i, ended := range all {
			if r := <-ended; r.code != 0 {
				t.Errorf("%v: exit code %d, %s", commands[i], r.code, r.stderr)
			}
		}
		d := statusOf(t, dev)
		if d["size"] != float64(size<<20) || d["timeout"] != float64(timeout) || d["state"] != "live" {
			t.Errorf("the device is %v", d)
		}
		if got := sysfs(t, dev, "size"); got != fmt.Sprint(size<<11) {
			t.Errorf("the kernel shows %s sectors, want %d", got, size<<11)
		}
		awaitServers(t, ownerOf(t, dev))
		load.goesOn(before)
	}
	load.stop()
	// The end of a device beside its upgrade.
	for range upgrades() {
		dev := connected(t, "memory", "--size", "1M")
		upgrade := begin(t, nbdctlCommand(t, "upgrade", dev))
		must(t, "disconnect", dev)
		if r := <-upgrade; r.code != 0 && r.code != int(exit.NotFound) {
			t.Errorf("upgrade: exit code %d, %s", r.code, r.stderr)
		}
		if l := listed(t, dev); l != nil {
			t.Errorf("list shows %v", l)
		}
	}
}

// TestKernelUpgradeRefused asks for upgrades that there can't be.
func TestKernelUpgradeRefused(t *testing.T) {
	requireKernel(t, orphanNoise, `NBD_DISCONNECT|timed out`)
	byIoctl := connected(t, "memory", "--size", "1M", "--ioctl", "--name", "ioctl")
	image := filepath.Join(imageDir(t), "disk.img")
	sh(t, "truncate -s 1M "+image)
	longer := connected(t, "file", image, "--name", "longer")
	sh(t, "truncate -s 2M "+image)
	foreground := nbdctlCommand(t, "connect", "--foreground", "memory", "--size", "1M", "--name", "foreground")
	ended := begin(t, foreground)
	eventually(t, func() bool { return len(listJSON(t)) == 3 }, "a device in the foreground")
	for _, tt := range []struct {
		args []string
		code exit.Code
		says string
	}{
		{[]string{"ioctl"}, exit.Unsupported, "a device by ioctls ends with the process that has connected it"},
		{[]string{"longer"}, exit.Failure, "backend size is 2097152 instead of 1048576"},
		{[]string{"foreground"}, exit.Unsupported, "is served in the foreground"},
		{[]string{"nothing"}, exit.NotFound, "nothing"},
		{nil, exit.Usage, "upgrade takes either devices"},
		{[]string{"--all", "longer"}, exit.Usage, "upgrade takes either devices"},
		{[]string{"--all"}, exit.Unsupported, "a device by ioctls ends"},
		{[]string{"longer", "nothing"}, exit.NotFound, "backend size"},
	} {
		r := nbdctl(t, append([]string{"upgrade"}, tt.args...)...)
		if !r.ended(tt.code, tt.says) || r.stdout != "" || strings.Contains(r.stderr, "panic") {
			t.Errorf("upgrade %v: exit code %d, %s%s; want %d, %q",
				tt.args, r.code, r.stdout, r.stderr, tt.code, tt.says)
		}
	}
	for _, d := range listJSON(t) {
		if d["state"] != "live" {
			t.Errorf("%v is %v", d["label"], d["state"])
		}
	}
	sh(t, "truncate -s 1M "+image)
	must(t, "upgrade", longer)
	must(t, "disconnect", longer, byIoctl)
	if err := foreground.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if r := <-ended; r.code != 0 {
		t.Errorf("the foreground: %d, %s", r.code, r.stderr)
	}

	orphan := connected(t, "memory", "--size", "1M", "--restart", "no")
	kill(t, orphan, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, orphan)["state"] == "orphaned" }, "%s orphaned", orphan)
	if r := nbdctl(t, "upgrade", orphan); !r.ended(exit.Failure, "is orphaned") {
		t.Errorf("an orphan: exit code %d, %s", r.code, r.stderr)
	}
	if out := must(t, "upgrade", "--all"); out != "" {
		t.Errorf("of all that are served it says %q", out)
	}
	must(t, "disconnect", orphan)
}
