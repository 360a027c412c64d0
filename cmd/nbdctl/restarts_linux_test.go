package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

// rounds is how many an environment variable asks for, as make survive does, or else few.
func rounds(variable string, few int) int {
	if n, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return n
	}
	return few
}

// A verified load writes to a file system on a device until it is told to stop, and verifies what
// it has written.
type verified struct {
	t        *testing.T
	dev, mnt string
	system   fsKind
	ended    <-chan result
}

// An fsKind has commands that make and check it.
type fsKind struct{ name, make, check string }

var (
	onExt4 = fsKind{"ext4", "mkfs.ext4 -q", "fsck.ext4 -fn"}
	// Those who test xfs may have small ones.
	onXFS = fsKind{"xfs", "TEST_DIR=1 TEST_DEV=1 QA_CHECK_FS=1 mkfs.xfs -q", "xfs_repair -n"}
)

func verifiedLoad(t *testing.T, dev string) *verified {
	t.Helper()
	return verifiedLoadOn(t, dev, onExt4)
}

func verifiedLoadOn(t *testing.T, dev string, system fsKind) *verified {
	t.Helper()
	mnt := t.TempDir()
	sh(t, system.make+" "+dev+"; mount "+dev+" "+mnt)
	t.Cleanup(func() { finish(t, command(t, "sh", "-c", "umount "+mnt+" 2>/dev/null")) })
	script := "while ! test -e " + mnt + "/stop; do fio --name=verify --directory=" + mnt + ` --size=6M --minimal \
		--ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-64k --fsync=16 \
		--verify=crc32c --do_verify=1 --verify_fatal=1 >/dev/null; done`
	v := &verified{t, dev, mnt, system, begin(t, commandFor(t, time.Hour, "sh", "-ec", script))}
	eventually(t, func() bool { return writes(t, dev) > 200 }, "writes")
	return v
}

// goesOn waits until more is written than before.
func (v *verified) goesOn(before int) {
	v.t.Helper()
	eventually(v.t, func() bool { return writes(v.t, v.dev) > before+50 }, "writes to go on")
}

// stop ends the load, which must not have failed, and has the file system checked.
func (v *verified) stop() {
	v.t.Helper()
	sh(v.t, "touch "+v.mnt+"/stop")
	if r := <-v.ended; r.code != 0 {
		v.t.Errorf("the load: %d, %s%s", r.code, r.stdout, r.stderr)
	}
	sh(v.t, "umount "+v.mnt+"; "+v.system.check+" "+v.dev)
}

// times are how long something took, several times.
type times []time.Duration

func (d times) String() string {
	slices.Sort(d)
	const exact = time.Millisecond
	return fmt.Sprintf("%v (median), at most %v", d[len(d)/2].Round(exact), d[len(d)-1].Round(exact))
}

// readOnce reads from a device past the page cache, and returns where the result comes and when.
func readOnce(t *testing.T, dev string) <-chan time.Time {
	t.Helper()
	reading := begin(t, command(t, "dd", "if="+dev, "iflag=direct", "bs=4k", "count=1", "of=/dev/null"))
	done := make(chan time.Time, 1)
	go func() {
		if r := <-reading; r.code != 0 {
			t.Errorf("a read: %s", r.stderr)
		}
		done <- time.Now()
	}()
	return done
}

// TestKernelRemoteRestarts has a server killed again and again under a file system that is
// verified: no request fails, nothing is lost, and the file system is clean.
func TestKernelRemoteRestarts(t *testing.T) {
	requireKernel(t, lostNoise)
	bothWays(t, testRestarts)
}

// lostNoise is what the kernel says of connections that it has lost itself.
const lostNoise = `Receive control failed|Dead connection, failed to find a fallback|Send (control|data) failed|` +
	`Connection timed out|shutting down sockets|Receive data failed|reconnected socket|Request send failed, requeueing`

func testRestarts(t *testing.T, way string) {
	n := rounds("NBD_TEST_RESTARTS", 3)
	image := filepath.Join(imageDir(t), "disk.img")
	f := farServer(t, "file", "--create", "--size", "32M", image, "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	// The kernel sends what was in flight on a dead connection again when its time is up.
	dev := connected(t, f.uri, "-o", way, "--timeout", "3s")
	load := verifiedLoad(t, dev)
	var waits, flows times // from when the server is back until something is read, and the load goes on
	for range n {
		before := writes(t, dev)
		f.kill()
		reading := readOnce(t, dev)
		f.start()
		back := time.Now()
		waits = append(waits, max(0, (<-reading).Sub(back)))
		load.goesOn(before)
		flows = append(flows, time.Since(back))
	}
	load.stop()
	r := remoteOf(t, dev)
	// A connection of the kernel's counts once the receiver of the one before has ended, for which
	// a server that is killed again at once does not live long enough.
	least := n
	if way == "way=direct" {
		least = max(1, n/2)
	}
	if replaced, _ := r["replaced"].(float64); int(replaced) > n || int(replaced) < least || r["error"] != nil {
		t.Errorf("after %d restarts the remote is %v", n, r)
	}
	t.Logf("%d restarts: after the server was back, something was read in %v; what was in flight went on in %v",
		n, waits, flows)
	must(t, "disconnect", dev)
}

// A network is a link to a machine of its own, as far as its network goes: servers in it are far.
type network struct{ t *testing.T }

// onFar are the words before a command that make it one of that machine.
var onFar = []string{"ip", "netns", "exec", "far"}

// listenFar is where servers listen in it.
const listenFar = "tcp:10.9.9.2:0"

func newNetwork(t *testing.T) network {
	t.Helper()
	sh(t, `ip netns add far
		ip link add near type veth peer name far netns far
		ip addr add 10.9.9.1/24 dev near
		ip -n far addr add 10.9.9.2/24 dev far
		ip link set near up
		ip -n far link set far up`)
	t.Cleanup(func() { sh(t, "ip netns del far") }) // and with it the link
	return network{t}
}

// set takes the link up or down at its far end, without a word to any connection.
func (n network) set(state string) {
	n.t.Helper()
	sh(n.t, "ip -n far link set far "+state)
}

// TestKernelRemoteCut cuts the network under file systems that are verified, for so long that
// connections are given up, and before that, as make survive has it, for moments.
func TestKernelRemoteCut(t *testing.T) {
	requireKernel(t, lostNoise)
	n := newNetwork(t)
	var devs []string
	var loads []*verified
	for _, way := range []string{"direct", "relay"} {
		image := filepath.Join(imageDir(t), "disk.img")
		f := farServerIn(t, onFar, "file", "--create", "--size", "32M", image, "--listen", listenFar)
		devs = append(devs, connected(t, f.uri, "-o", "way="+way))
	}
	for _, dev := range devs { // afterwards, for the servers have copies of what is mounted when they start
		loads = append(loads, verifiedLoad(t, dev))
	}
	defer func() {
		if t.Failed() {
			t.Log(sh(t, "cat $NBDCTL_STATE_DIR/*/log $NBDCTL_STATE_DIR/*/state.json; nbdctl list || true"))
		}
	}()
	waits := make([]times, len(devs)) // from when the network is back until something is read
	before := make([]int, len(devs))
	for i := range rounds("NBD_TEST_CUTS", 0) {
		n.set("down")
		var reading []<-chan time.Time
		for i, dev := range devs {
			before[i] = writes(t, dev)
			reading = append(reading, readOnce(t, dev))
		}
		<-time.After(time.Duration(1+i%5) * time.Second) // So long is the cut.
		n.set("up")
		back := time.Now()
		for i := range devs {
			waits[i] = append(waits[i], max(0, (<-reading[i]).Sub(back)))
			loads[i].goesOn(before[i])
		}
	}
	for i, way := range []string{"direct", "relay"} {
		if len(waits[i]) > 0 {
			t.Logf("%s: I/O went on after a cut in %v", way, waits[i])
		}
		before[i] = writes(t, devs[i])
	}
	n.vanish(devs...)
	for i, dev := range devs {
		loads[i].goesOn(before[i])
		loads[i].stop()
		must(t, "disconnect", dev)
	}
}

// vanish has the servers of devices vanish without a word until each is missed, and come back.
func (n network) vanish(devs ...string) {
	t := n.t
	t.Helper()
	begun := time.Now()
	n.set("down")
	for _, dev := range devs {
		eventually(t, func() bool { return remoteOf(t, dev)["error"] != nil }, "the loss of %s to be noticed", dev)
		took := time.Since(begun)
		t.Logf("the server of %s vanished, and was missed after %v", dev, took.Round(time.Second))
		if took > noticed {
			t.Errorf("that is more than the %v that are documented, and some for a slow machine", noticed)
		}
	}
	n.set("up")
	for _, dev := range devs {
		eventually(t, func() bool { return remoteOf(t, dev)["connections_alive"] == 1.0 }, "a connection of %s", dev)
	}
}

// noticed is within what time a server is missed that vanishes without a word: 25 seconds, and some
// more for a slow machine.
const noticed = 30 * time.Second
