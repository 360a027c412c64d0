//go:build survive

package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestKernelRemoteIdle has servers vanish of which nobody wants anything.
func TestKernelRemoteIdle(t *testing.T) {
	requireKernel(t, lostNoise)
	n := newNetwork(t)
	var devs []string
	for _, way := range []string{"direct", "relay"} {
		f := farServerIn(t, onFar, "memory", "--size", "1M", "--listen", listenFar)
		devs = append(devs, connected(t, f.uri, "-o", "way="+way))
	}
	n.vanish(devs...)
	for _, dev := range devs {
		<-readOnce(t, dev)
		must(t, "disconnect", dev)
	}
}

// TestKernelPersist does to nbd-client -persist what TestKernelRemoteRestarts does to ours, and
// tells what becomes of its device. Nothing of that is ours, so nothing but a missing device fails.
func TestKernelPersist(t *testing.T) {
	requireKernel(t, ".*")
	const dev = "/dev/nbd7"
	image, socket := filepath.Join(imageDir(t), "disk.img"), filepath.Join(shortDir(t), "s")
	f := farServer(t, "file", "--create", "--size", "32M", image, "--name", "disk", "--listen", "unix:"+socket)
	for _, how := range [][]string{{"-persist"}, {"-persist", "-L", "-n"}} {
		name := "nbd-client " + strings.Join(how, " ")
		attach := command(t, "nbd-client", append(how, "-u", socket, "-N", "disk", "-timeout", "30", dev)...)
		if err := attach.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { return listed(t, dev) != nil }, "%s", name)
		t.Log(name + ": " + persisted(t, f, dev))
		finish(t, command(t, "nbd-client", "-d", dev))
		_ = attach.Process.Kill() // It has ended, where it is not the one that serves.
		_ = attach.Wait()
		eventually(t, func() bool { return listed(t, dev) == nil }, "the end of %s", name)
	}
}

// persisted says how many restarts of the server the device has survived.
func persisted(t *testing.T, f *far, dev string) string {
	t.Helper()
	n := rounds("NBD_TEST_RESTARTS", 3)
	for i := range n {
		f.kill()
		read := []string{"60", "dd", "if=" + dev, "iflag=direct", "bs=4k", "count=1", "of=/dev/null"}
		reading := begin(t, command(t, "timeout", read...))
		f.start()
		if r := <-reading; r.code != 0 {
			said := strings.TrimSpace(strings.ReplaceAll(r.stderr, "\n", "; "))
			return fmt.Sprintf("a read in round %d of %d fails: %s; afterwards it is %v", i+1, n, said, stateOf(t, dev))
		}
	}
	return fmt.Sprintf("all %d restarts are survived", n)
}

// stateOf is the state of a device, and whether anything can be read.
func stateOf(t *testing.T, dev string) string {
	d := listed(t, dev)
	if d == nil {
		return "gone"
	}
	err := exec.Command("timeout", "10", "dd", "if="+dev, "iflag=direct", "bs=4k", "count=1", "of=/dev/null").Run()
	return fmt.Sprintf("%v, and a read says %v", d["state"], err)
}
