package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelAttach has another process go on with devices whose own one was killed under load: no
// request fails, and no byte is wrong.
func TestKernelAttach(t *testing.T) {
	for _, tt := range []struct {
		name string
		args func(t *testing.T) []string
	}{
		{"file", func(t *testing.T) []string {
			return []string{"file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M"}
		}},
		{"file, direct, two connections", func(t *testing.T) []string {
			return []string{"file", filepath.Join(imageDir(t), "disk.img"), "--create", "--size", "64M",
				"-o", "direct=on", "--connections", "2"}
		}},
		{"relay", func(t *testing.T) []string {
			f := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{f.uri, "-o", "way=relay", "--timeout", "1s", "--dead-timeout", "4s"} // 6 s for the kernel
		}},
		{"remote, direct, two connections", func(t *testing.T) []string {
			f := farServer(t, "memory", "--size", "64M", "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
			return []string{f.uri, "-o", "way=direct", "--connections", "2"}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t, orphanNoise, lostNoise)
			nbdnltest.Identifiers.Need(t)
			flags := []string{"--name", "attached", "--timeout", "2s", "--dead-timeout", "1h", "--restart", "no"}
			dev := connected(t, append(flags, tt.args(t)...)...)
			load := verifiedLoad(t, dev)
			for range 2 {
				load.goesOn(writes(t, dev))
				pid := kill(t, dev, syscall.SIGKILL)
				eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
				out := must(t, "attach", "attached")
				next := ownerOf(t, dev)
				want := fmt.Sprintf("%s attached: pid %d serves it in the place of pid %d\n",
					filepath.Base(dev), next, pid)
				if next == pid || out != want {
					t.Errorf("attach prints %q, and pid %d serves the device", out, next)
				}
				load.goesOn(writes(t, dev))
			}
			load.stop()
			// Connections that are not seen are found one after the other.
			eventually(t, func() bool { return listed(t, dev)["state"] == "live" }, "%s live", dev)
			if d := statusOf(t, dev); d["label"] != "attached" {
				t.Errorf("the device is %v", d)
			}
			if !strings.Contains(tt.name, "remote") { // of which the kernel counts
				must(t, "stats", "attached")
			}
			must(t, "disconnect", "attached")
			awaitNoServer(t)
		})
	}
}

// TestKernelAttachRefused asks for what a device can't be attached to. It waits for what it can.
func TestKernelAttachRefused(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise)
	nbdnltest.Identifiers.Need(t)
	dir := imageDir(t)
	image, moved := filepath.Join(dir, "disk.img"), filepath.Join(dir, "moved.img")
	other, longer := filepath.Join(dir, "other.img"), filepath.Join(dir, "longer.img")
	dev := connected(t, "file", image, "--create", "--size", "8M", "--name", "file",
		"--timeout", "2s", "--dead-timeout", "1h", "--restart", "no")
	sh(t, "yes | head -c 1M | dd of="+dev+" oflag=direct bs=64k iflag=fullblock status=none; cp "+image+" "+other+
		"; mv "+image+" "+moved+"; ln "+moved+" "+longer)
	refused := func(code exit.Code, says string, args ...string) {
		t.Helper()
		r := nbdctl(t, append([]string{"attach"}, args...)...)
		if !r.ended(code, says) || r.stdout != "" {
			t.Errorf("attach %v: exit code %d, %s%s; want %d, %q", args, r.code, r.stdout, r.stderr, code, says)
		}
	}
	refused(exit.Busy, "is served by pid", "file")
	forgetful := connected(t, "memory", "--size", "1M", "--name", "memory", "--restart", "no")
	for _, d := range []string{dev, forgetful} {
		kill(t, d, syscall.SIGKILL)
		eventually(t, func() bool { return listed(t, d)["state"] == "orphaned" }, "%s orphaned", d)
	}
	reading := begin(t, command(t, "sh", "-ec", "dd if="+dev+" iflag=direct bs=64k count=16 status=none | sha256sum"))
	refused(exit.Usage, "takes a device")
	refused(exit.NotFound, "nothing", "nothing")
	refused(exit.Failure, "what was in memory is lost", "memory")
	refused(exit.Failure, "no such file", "file")
	refused(exit.Failure, "is another object than", "file", "file", other)
	refused(exit.Usage, "a backend of the kind file", "file", "memory")
	refused(exit.Usage, "is too much", "file", "file", moved, "more")
	refused(exit.Usage, "no option", "file", "-o", "nonsense=on")
	sh(t, "truncate -s 9M "+moved)
	refused(exit.Failure, "backend size is 9437184 instead of 8388608", "file", "file", moved)
	sh(t, "truncate -s 8M "+moved)
	holder := connected(t, "file", longer)
	refused(exit.Busy, "in use by nbdctl", "file", "file", moved)
	must(t, "disconnect", holder)
	if d := listed(t, dev); d["state"] != "orphaned" {
		t.Errorf("the device is %v", d["state"])
	}
	first := begin(t, nbdctlCommand(t, "attach", "file", "file", moved))
	second := begin(t, nbdctlCommand(t, "attach", "file", "file", moved))
	codes := map[int]int{}
	for _, ended := range []<-chan result{first, second} {
		r := <-ended
		codes[r.code]++
		if r.code != 0 && r.code != int(exit.Busy) {
			t.Errorf("attach: exit code %d, %s", r.code, r.stderr)
		}
	}
	if codes[0] != 1 {
		t.Errorf("of two that attach, %d have", codes[0])
	}
	want := sh(t, "head -c 1M "+moved+" | sha256sum")
	if r := <-reading; r.code != 0 || strings.TrimSpace(r.stdout) != strings.TrimSpace(want) {
		t.Errorf("a read that has waited: %d, %s%s, want %s", r.code, r.stdout, r.stderr, want)
	}
	if d := statusOf(t, dev); d["backend"] != "file "+moved || d["state"] != "live" {
		t.Errorf("the device is %v", d)
	}
	must(t, "disconnect", "file", "memory")
	awaitNoServer(t)
}

// TestKernelAttachLate has a device served again that does not wait: what was asked meanwhile has
// failed, and what comes then does not.
func TestKernelAttachLate(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise, `I/O error`)
	nbdnltest.Identifiers.Need(t)
	image := filepath.Join(imageDir(t), "disk.img")
	dev := connected(t, "file", image, "--create", "--size", "1M", "--timeout", "2s", "--dead-timeout", "0s")
	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	if r := finish(t, command(t, "dd", "if="+dev, "iflag=direct", "bs=4k", "count=1", "of=/dev/null")); r.code == 0 {
		t.Errorf("a device that nobody serves was read")
	}
	must(t, "attach", dev)
	sh(t, "yes | head -c 64k | dd of="+dev+" oflag=direct bs=64k iflag=fullblock status=none")
	if sh(t, "head -c 64k "+image+" | sha256sum") != sh(t, "yes | head -c 64k | sha256sum") {
		t.Errorf("the image has other bytes than were written")
	}
	if d := statusOf(t, dev); d["dead_timeout"] != 60.0 {
		t.Errorf("the dead timeout is %v", d["dead_timeout"])
	}
	must(t, "disconnect", dev)
	awaitNoServer(t)
}

// TestKernelAttachDirect has devices that the kernel has connected itself go on without a process,
// lose their server, and be watched over again: by the keeper's doing while the server is away, and
// by hand when both processes are dead.
func TestKernelAttachDirect(t *testing.T) {
	requireKernel(t, orphanNoise, lostNoise)
	nbdnltest.Identifiers.Need(t) // to attach
	image := filepath.Join(imageDir(t), "disk.img")
	f := farServer(t, "file", "--create", "--size", "32M", image, "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	dev := connected(t, f.uri, "-o", "way=direct", "--name", "far", "--timeout", "3s", "--restart", "1000")
	load := verifiedLoad(t, dev)
	again := func() {
		t.Helper()
		before := writes(t, dev)
		f.start()
		load.goesOn(before)
		eventually(t, func() bool { return listed(t, dev)["state"] == "live" }, "%s live", dev)
	}

	f.kill()
	pid := kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return ownerOf(t, dev) != pid }, "another process")
	eventually(t, func() bool { return listed(t, dev)["state"] == "waiting" }, "%s waiting", dev)
	again()

	bothDie(t, dev)
	load.goesOn(writes(t, dev))
	f.kill()
	f.start()
	if r := nbdctl(t, "attach", "far", f.uri, "-o", "way=relay"); !r.ended(exit.Unsupported, "use -o way=direct") {
		t.Errorf("attach: %d, %s", r.code, r.stderr)
	}
	before := writes(t, dev)
	must(t, "attach", "far")
	load.goesOn(before)

	bothDie(t, dev)
	must(t, "attach", "far") // to a connection that is alive
	load.goesOn(writes(t, dev))
	f.kill()
	again()
	load.stop()
	must(t, "disconnect", "far")
	awaitNoServer(t)
}
