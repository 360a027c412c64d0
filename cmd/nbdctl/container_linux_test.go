package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// inside prepares a shell script in namespaces of its own, those that the
// options of unshare(1) say. In it, nbdctl is the command.
func inside(t testing.TB, options, script string) result {
	t.Helper()
	self := nbdctlCommand(t)
	args := append(strings.Fields(options), "bash", "-c", `nbdctl() { "$NBDCTL" "$@"; }; `+script)
	cmd := command(t, "unshare", args...)
	cmd.Env = append(self.Env, "NBDCTL="+self.Path)
	return finish(t, cmd)
}

// wantInside runs a script in namespaces, which has to end with that code, and
// to say so.
func wantInside(t *testing.T, options, script string, code exit.Code, says string) {
	t.Helper()
	r := inside(t, options, script)
	if r.code != int(code) || !strings.Contains(r.stdout+r.stderr, says) {
		t.Errorf("unshare %s, %s: exit code %d, want %d and %q\n%s%s",
			options, script, r.code, code, says, r.stdout, r.stderr)
	}
}

// session is the life of a device: it fails when one of its steps does.
const session = `set -e; dev=$(nbdctl connect memory --size 64M); mkfs.ext4 -q $dev
	nbdctl list | grep -q live; nbdctl resize $dev 96M; nbdctl stats $dev | grep -q write; nbdctl disconnect $dev; `

// watchOnce prints the first line of watch.
const watchOnce = `exec 3< <(exec "$NBDCTL" watch); read -r line <&3; kill $!; echo "$line"`

// TestKernelPrivateNetwork shows that nbdctl works in a network namespace of
// its own, and that it says so if the kernel leaves it only ioctls there.
func TestKernelPrivateNetwork(t *testing.T) {
	requireKernel(t)
	const net = "--net"
	outside := connected(t, "memory", "--size", "1M", "--name", "outside")
	wantInside(t, net, "nbdctl list", exit.OK, "outside")
	wantInside(t, net, "nbdctl status outside", exit.OK, "live")
	wantInside(t, net, "nbdctl resize outside 2M", exit.OK, "2M") // by the process that serves it
	mode, warning := "ioctl", "is connected by ioctls"
	if nbdnltest.Namespaces.In(t) {
		mode, warning = "netlink", ""
	}
	wantInside(t, net, session, exit.OK, warning)
	wantInside(t, net, "nbdctl connect memory --size 1M --name inside", exit.OK, warning)
	d := statusOf(t, "inside")
	if d["mode"] != mode || d["state"] != "live" || d["owner"].(map[string]any)["ours"] != true {
		t.Errorf("status is %v, want mode %s", d, mode)
	}
	must(t, "disconnect", "inside")
	wantInside(t, net, watchOnce, exit.OK, "present")
	wantInside(t, net, "nbdctl disconnect outside", exit.OK, "")
	if d := listed(t, outside); d != nil {
		t.Errorf("list shows %v", d)
	}
}

// TestKernelPrivateMounts shows what nbdctl needs of /dev, and that others'
// /run hides what is known of a device, but not the device.
func TestKernelPrivateMounts(t *testing.T) {
	requireKernel(t)
	const mounts = "--mount"
	wantInside(t, mounts, session, exit.OK, "")
	const noDev = "mount -t tmpfs none /dev; mknod /dev/null c 1 3; "
	wantInside(t, mounts, noDev+"nbdctl connect memory --size 1M", exit.Failure, "devtmpfs")
	if d := listJSON(t); len(d) != 0 {
		t.Errorf("a connect that failed has left %v", d)
	}
	index := strings.TrimPrefix(connected(t, "memory", "--size", "1M"), "/dev/nbd")
	must(t, "disconnect", "nbd"+index)
	wantInside(t, mounts, noDev+fmt.Sprintf("mknod /dev/nbd%s b 43 $((32 * %[1]s)); "+
		"nbdctl connect memory --size 1M --device nbd%[1]s && nbdctl disconnect nbd%[1]s", index), exit.OK, "")
	// As containers have it: the settings of the device's queue can't be made.
	wantInside(t, mounts, "mount --bind /sys /sys && mount -o remount,bind,ro /sys; "+session, exit.OK, "")

	outside := connected(t, "memory", "--size", "1M", "--name", "outside")
	const noRun = "export NBDCTL_STATE_DIR=/tmp/elsewhere.$$; trap 'rm -rf $NBDCTL_STATE_DIR' EXIT; "
	wantInside(t, mounts, noRun+"nbdctl list", exit.OK, strings.TrimPrefix(outside, "/dev/"))
	wantInside(t, mounts, noRun+"nbdctl disconnect outside", exit.NotFound, "no device outside")
	if nbdnltest.Identifiers.In(t) {
		wantInside(t, mounts, noRun+"nbdctl disconnect "+outside, exit.OK, "")
	} else {
		wantInside(t, mounts, noRun+"nbdctl disconnect "+outside, exit.Permission, "not ours")
	}
}

// TestKernelPrivateProcesses shows that a device is served in a process
// namespace for as long as that lives, and can be told and freed from outside.
func TestKernelPrivateProcesses(t *testing.T) {
	requireKernel(t, `I/O error|Receive control failed|shutting down sockets|Send control failed`,
		`Send disconnect failed|Dead connection|Request send failed|Attempted send on invalid socket`)
	const processes = "--pid --fork --mount-proc"
	wantInside(t, processes, session, exit.OK, "")
	// By ioctls, the process that has the device open uses it as little as outside.
	wantInside(t, processes, "nbdctl connect memory --ioctl --size 2M --name small && "+
		"nbdctl resize small 1M && nbdctl disconnect small", exit.OK, "1M")

	in := t.TempDir()
	ended := make(chan result, 1)
	go func() {
		ended <- inside(t, processes, "nbdctl connect memory --size 1M --name inside && touch "+in+"/connected; "+
			"until test -e "+in+"/end; do sleep 0.05; done")
	}()
	eventually(t, func() bool { _, err := os.Stat(in + "/connected"); return err == nil }, "the connect inside")
	if d := statusOf(t, "inside"); d["state"] != "live" || d["owner"].(map[string]any)["ours"] != true {
		t.Errorf("from outside it is %v", d)
	}
	must(t, "resize", "inside", "2M")
	sh(t, "touch "+in+"/end")
	if r := <-ended; r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	orphaned := func() bool { return statusOf(t, "inside")["state"] == "orphaned" }
	eventually(t, orphaned, "it without the process that went with the namespace")
	must(t, "disconnect", "inside")
}

// TestKernelPrivateUsers shows that no privilege in another user namespace
// than the first one counts, and that list, status and watch need none.
func TestKernelPrivateUsers(t *testing.T) {
	requireKernel(t)
	dev := connected(t, "memory", "--size", "1M", "--name", "outside")
	for users, says := range map[string]string{
		"--user":                 "needs the capability CAP_SYS_ADMIN",
		"--user --map-root-user": "not permitted",
	} {
		wantInside(t, users, "nbdctl connect memory --size 1M", exit.Permission, "CAP_SYS_ADMIN")
		wantInside(t, users, "nbdctl disconnect outside", exit.Permission, says)
		wantInside(t, users, "nbdctl list", exit.OK, "outside")
		wantInside(t, users, "nbdctl status outside", exit.OK, "live")
		wantInside(t, users, watchOnce, exit.OK, "present")
	}
	if d := listed(t, dev); d == nil || d["state"] != "live" {
		t.Errorf("list shows %v", d)
	}
	if d := listJSON(t); len(d) != 1 {
		t.Errorf("list shows %v", d)
	}
}
