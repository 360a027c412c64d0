package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKernelDoctorHealthy shows that on a machine on which nothing is wrong
// doctor finds so, and that what it says of the machine is true.
func TestKernelDoctorHealthy(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	identifiers := nbdnltest.Identifiers.In(t) // which is found out on devices
	same := sameMachine(t)
	all := listJSON(t, "--all")
	log := openKernelLog(t)
	d := doctorRun(t)
	same()
	refused := 0
	log.lines(t, func(line string) {
		if strings.Contains(line, "Unsupported socket") {
			refused++
		}
	})
	if d.code != exit.OK {
		t.Errorf("code %d", d.code)
	}
	if os.Getenv("NBD_LAB") != "" && identifiers {
		d.wantHealthy(t)
	}
	d.says(t, "kernel", "ok", sh(t, "uname -r"))
	parameter := func(name string) string { return name + "=" + sh(t, "cat /sys/module/nbd/parameters/"+name) }
	d.says(t, "parameters", "ok", parameter("nbds_max"), parameter("max_part"))
	d.says(t, "nodes", "ok", fmt.Sprintf("%d devices, %s to %s", len(all), all[0]["path"], all[len(all)-1]["path"]))
	d.says(t, "devices", "ok", "0 of nbdctl, 0 of other programs")
	d.says(t, "sockets", "ok", "takes Unix stream, TCP")
	if says := strings.Contains(d.lines["sockets"][0].Seen, "refuses"); says != (refused == 1) {
		t.Errorf("the kernel refused %d sockets, doctor says %s", refused, d.lines["sockets"][0].Seen)
	}

	// What a device of nbdctl has, doctor has seen.
	dev := connected(t, "memory", "--size", "1M", "--connections", "1")
	features := strings.ToLower(d.lines["features"][0].Seen)
	for _, f := range statusOf(t, dev)["features"].([]any) {
		has, lacks, _ := strings.Cut(features, "; not in this kernel:")
		if !strings.Contains(has, f.(string)) || strings.Contains(lacks, f.(string)) {
			t.Errorf("a device has %s, doctor says %s", f, features)
		}
	}
	has := statusOf(t, dev)["identifier"] != nil
	if inKernel, _, _ := strings.Cut(features, "; not in"); has != strings.Contains(inKernel, "identifiers") {
		t.Errorf("an identifier shows: %v; doctor says %s", has, features)
	}
	must(t, "disconnect", dev)
	large := nbdctl(t, "connect", "memory", "--size", "1M", "--block-size", "64k")
	if (large.code == 0) != strings.Contains(features, "blocks of 512 to 65536 bytes") {
		t.Errorf("blocks of 64 KiB: code %d, doctor says %s", large.code, features)
	}
	if large.code == 0 {
		must(t, "disconnect", "--all")
	}
	for range 2 {
		text := must(t, "doctor")
		if strings.Count(text, "\n") < len(d.lines) || !strings.HasPrefix(text, "ok       kernel      Linux ") {
			t.Errorf("doctor prints\n%s", text)
		}
	}
}

// TestKernelDoctorModule shows what doctor says without the module, that it
// does not load it unasked, and that it does if asked.
func TestKernelDoctorModule(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	sh(t, "modprobe -r nbd")
	t.Cleanup(func() { sh(t, "modprobe nbd") })
	loaded := func() bool { _, err := os.Stat("/sys/module/nbd"); return err == nil }

	d := doctorRun(t)
	d.says(t, "module", "warning", "not loaded", "modprobe nbd")
	if loaded() || d.code != exit.OK || !d.one(t, "module", "warning").Fixable {
		t.Errorf("loaded %t, code %d, %v", loaded(), d.code, d.lines["module"])
	}
	for _, check := range []string{
		"parameters", "control", "nodes", "device", "features", "sockets", "openers", "cost",
	} {
		d.says(t, check, "unknown", "needs the nbd module")
	}

	// Without one to load: neither for us nor for the kernel itself.
	const helper = "/proc/sys/kernel/modprobe"
	was := sh(t, "cat "+helper)
	sh(t, "echo /bin/false >"+helper)
	none := []string{"unshare", "--mount", "sh", "-ec", `mount -t tmpfs none /lib/modules/$(uname -r); exec "$0" "$@"`}
	absent := examined(t, within(nbdctlCommand(t, "doctor", "--json", "--fix"), none...))
	connect := finish(t, within(nbdctlCommand(t, "connect", "memory", "--size", "1M"), none...))
	sh(t, "echo "+was+" >"+helper)
	l := absent.one(t, "module", "problem")
	if l.Fixable || l.Remedy == nil || absent.code != exit.Unsupported || connect.code != int(exit.Unsupported) {
		t.Errorf("without a module doctor exits with %d, connect with %d; %v", absent.code, connect.code, l)
	}
	if loaded() {
		t.Fatal("it is loaded by now")
	}

	d = doctorRun(t, "--fix")
	if l := d.one(t, "module", "ok"); l.Fixed == nil || *l.Fixed != "modprobe nbd" || !loaded() || d.code != exit.OK {
		t.Errorf("loaded %t, code %d, %v", loaded(), d.code, l)
	}
	d.says(t, "device", "ok", "connected")
}

// TestKernelDoctorOptions follows doctor's advice about a parameter that does
// not exist.
func TestKernelDoctorOptions(t *testing.T) {
	if os.Getenv("NBD_LAB") == "" {
		t.Log("not in the lab: /run/modprobe.d is the machine's, and is put back")
	}
	requireKernel(t, refusedSocket, `unknown parameter .max_dev. ignored`)
	sh(t, "mkdir -p /run/modprobe.d; echo 'options nbd max_dev=20' >/run/modprobe.d/zz-nbd-test.conf")
	t.Cleanup(func() { sh(t, "rm /run/modprobe.d/zz-nbd-test.conf; modprobe -r nbd && modprobe nbd") })
	reload(t)
	d := doctorRun(t)
	l := d.one(t, "options", "warning")
	inForce := sh(t, "cat /sys/module/nbd/parameters/nbds_max")
	if !strings.Contains(l.Seen, "max_dev=20 in /run/modprobe.d/zz-nbd-test.conf") || inForce != "16" {
		t.Error(l)
	}
	sh(t, *l.Remedy)
	if n := sh(t, "ls -d /sys/block/nbd* | wc -l"); n != "20" {
		t.Errorf("after %s there are %s devices", *l.Remedy, n)
	}
	doctorRun(t).says(t, "options", "ok", "nbds_max=20")
}

// TestKernelDoctorUnprivileged shows what doctor says to a user without
// privileges, and that it is the rest of the truth.
func TestKernelDoctorUnprivileged(t *testing.T) {
	requireKernel(t, orphanNoise)
	reload(t)
	dev := connected(t, "memory", "--size", "1M", "--restart", "no")
	same := sameMachine(t)
	d := examined(t, commandAs(t, nobody, "doctor", "--json"))
	same()
	connect := finish(t, commandAs(t, nobody, "connect", "memory", "--size", "1M"))
	if d.code != exit.Permission || connect.code != int(exit.Permission) {
		t.Errorf("doctor exits with %d, connect with %d", d.code, connect.code)
	}
	d.says(t, "capability", "problem", "CAP_SYS_ADMIN is missing", "sudo")
	for _, check := range []string{"device", "features", "sockets", "openers", "cost"} {
		d.says(t, check, "unknown", "needs CAP_SYS_ADMIN")
	}
	d.says(t, "control", "ok", "netlink answers")
	d.says(t, "devices", "ok", "1 of nbdctl, 0 of other programs")
	d.says(t, "leftovers", "ok")

	// Whoever is root in a user namespace of their own is no more than that.
	contained := examined(t, within(nbdctlCommand(t, "doctor", "--json"), "unshare", "--user", "--map-root-user"))
	contained.says(t, "capability", "problem", "not in the first user namespace")

	kill(t, dev, syscall.SIGKILL)
	eventually(t, func() bool { return listed(t, dev)["state"] == "orphaned" }, "%s orphaned", dev)
	fix := finish(t, commandAs(t, nobody, "doctor", "--fix", "--json"))
	if !fix.ended(exit.Permission, "CAP_SYS_ADMIN") || fix.stdout != "" || listed(t, dev) == nil {
		t.Errorf("--fix exits with %d: %s%s", fix.code, fix.stdout, fix.stderr)
	}
	must(t, "disconnect", dev)
}

// TestKernelDoctorNetworkNamespace shows what doctor says in a network
// namespace in which old kernels do not show the driver.
func TestKernelDoctorNetworkNamespace(t *testing.T) {
	requireKernel(t, refusedSocket)
	reload(t)
	same := sameMachine(t)
	d := examined(t, within(nbdctlCommand(t, "doctor", "--json"), "unshare", "--net"))
	same()
	connect := finish(t, within(nbdctlCommand(t, "connect", "memory", "--size", "1M"), "unshare", "--net"))
	if int(d.code) != connect.code {
		t.Errorf("doctor exits with %d, connect with %d: %s", d.code, connect.code, connect.stderr)
	}
	if connect.code == 0 {
		must(t, "disconnect", strings.TrimSpace(connect.stdout))
	}
	d.says(t, "control", "warning", "namespace", "do nsenter --net=/proc/1/ns/net nbdctl")
	byIoctl := strings.Contains(connect.stderr, "by ioctls")
	if byIoctl != strings.Contains(d.lines["control"][0].String(), "by ioctls") {
		t.Errorf("connect says %q, doctor %v", connect.stderr, d.lines["control"])
	}
	d.says(t, "device", "ok", "was connected")
	// The remedy takes us out of it.
	doctor := nbdctlCommand(t, "doctor", "--json")
	remedied := examined(t, within(doctor, "unshare", "--net", "nsenter", "--net=/proc/1/ns/net"))
	remedied.says(t, "control", "ok", "netlink answers")
}

// TestKernelDoctorUdev follows doctor's advice about a real systemd-udevd.
func TestKernelDoctorUdev(t *testing.T) {
	udevd, err := filepath.Abs("../../testdata/lab/udevd")
	if err != nil {
		t.Fatal(err)
	}
	requireKernel(t, refusedSocket, openNoise)
	reload(t)
	sh(t, udevd+" start")
	defer sh(t, udevd+" stop")
	d := doctorRun(t)
	d.says(t, "udev", "warning", "60-block.rules", "udevadm control --reload")
	if !older(t, 5, 13) {
		d.says(t, "openers", "ok", "udev", "for whom nbdctl waits")
	}
	_, remedy, _ := strings.Cut(*d.lines["udev"][0].Remedy, "often: ")
	// The lab's /etc can't be written.
	sh(t, "mkdir -p /run/udev/rules.d; "+strings.ReplaceAll(remedy, "/etc/", "/run/"))
	defer sh(t, "rm /run/udev/rules.d/61-nbd.rules")
	doctorRun(t).says(t, "udev", "ok", "does not watch nbd devices (/run/udev/rules.d/61-nbd.rules)")

	dev := connected(t, "memory", "--size", "1M")
	sh(t, "udevadm settle")
	seen := command(t, "udevadm", "monitor", "--udev", "--subsystem-match=block")
	var out lockedBuffer
	seen.Stdout = &out
	if err := seen.Start(); err != nil {
		t.Fatal(err)
	}
	out.await(t, "UDEV - the event")
	sh(t, "dd if=/dev/zero of="+dev+" bs=4k count=1 status=none")
	// An event of the write would have come before this one.
	sh(t, "udevadm trigger --action=change /sys/block/nbd15 && udevadm settle")
	out.await(t, "nbd15")
	if strings.Contains(out.String(), filepath.Base(dev)+" ") {
		t.Errorf("udev still watches:\n%s", out.String())
	}
	seen.Process.Kill()
	seen.Wait()
	must(t, "disconnect", dev)
}
