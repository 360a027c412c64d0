package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	ended    <-chan result
}

func verifiedLoad(t *testing.T, dev string) *verified {
	t.Helper()
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+dev+"; mount "+dev+" "+mnt)
	t.Cleanup(func() { finish(t, command(t, "sh", "-c", "umount "+mnt+" 2>/dev/null")) })
	script := "while ! test -e " + mnt + "/stop; do fio --name=verify --directory=" + mnt + ` --size=6M --minimal \
		--ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-64k --fsync=16 \
		--verify=crc32c --do_verify=1 --verify_fatal=1 >/dev/null; done`
	v := &verified{t, dev, mnt, begin(t, commandFor(t, time.Hour, "sh", "-ec", script))}
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
	sh(v.t, "umount "+v.mnt+"; fsck.ext4 -fn "+v.dev)
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

// TestKernelRelayRestarts has a server killed again and again under a file system that is verified:
// no request fails, nothing is lost, and the file system is clean.
func TestKernelRelayRestarts(t *testing.T) {
	requireKernel(t)
	n := rounds("NBD_TEST_RESTARTS", 3)
	image := filepath.Join(imageDir(t), "disk.img")
	f := farServer(t, "file", "--create", "--size", "32M", image, "--listen", "unix:"+filepath.Join(shortDir(t), "s"))
	dev := connected(t, f.uri)
	load := verifiedLoad(t, dev)
	var waits times // from when the server is back until something is read
	for range n {
		before := writes(t, dev)
		f.kill()
		reading := readOnce(t, dev)
		f.start()
		back := time.Now()
		waits = append(waits, max(0, (<-reading).Sub(back)))
		load.goesOn(before)
	}
	load.stop()
	r := remoteOf(t, dev)
	if replaced, _ := r["replaced"].(float64); int(replaced) != n || r["error"] != nil {
		t.Errorf("after %d restarts the remote is %v", n, r)
	}
	t.Logf("%d restarts: I/O went on after the server was back in %v", n, waits)
	must(t, "disconnect", dev)
}

// setLoopback takes the link to this machine itself up or down, without a word to any connection.
func setLoopback(t *testing.T, up bool) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
	flags := lo.Uint16() &^ unix.IFF_UP
	if up {
		flags |= unix.IFF_UP
	}
	lo.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
}

// TestKernelRelayCut cuts the network under a file system that is verified, for so long that
// connections are given up, and before that, as make survive has it, for moments.
func TestKernelRelayCut(t *testing.T) {
	requireKernel(t)
	t.Cleanup(func() { setLoopback(t, true) })
	image := filepath.Join(imageDir(t), "disk.img")
	f := farServer(t, "file", "--create", "--size", "32M", image, "--listen", "tcp:127.0.0.1:0")
	dev := connected(t, f.uri)
	load := verifiedLoad(t, dev)
	defer func() {
		if t.Failed() {
			t.Log(sh(t, "cat $NBDCTL_STATE_DIR/*/log $NBDCTL_STATE_DIR/*/state.json; nbdctl status nbd0 || true"))
		}
	}()
	var waits times // from when the network is back until something is read
	for i := range rounds("NBD_TEST_CUTS", 0) {
		before := writes(t, dev)
		setLoopback(t, false)
		reading := readOnce(t, dev)
		<-time.After(time.Duration(1+i%5) * time.Second) // So long is the cut.
		setLoopback(t, true)
		back := time.Now()
		waits = append(waits, max(0, (<-reading).Sub(back)))
		load.goesOn(before)
	}
	if len(waits) > 0 {
		t.Logf("I/O went on after a cut in %v", waits)
	}
	before := writes(t, dev)
	vanish(t, dev)
	load.goesOn(before)
	load.stop()
	must(t, "disconnect", dev)
}

// vanish has the server vanish without a word until it is missed, and come back.
func vanish(t *testing.T, dev string) {
	t.Helper()
	begun := time.Now()
	setLoopback(t, false)
	eventually(t, func() bool { return remoteOf(t, dev)["error"] != nil }, "the loss to be noticed")
	took := time.Since(begun)
	setLoopback(t, true)
	eventually(t, func() bool { return remoteOf(t, dev)["connections_alive"] == 1.0 }, "a new connection")
	t.Logf("a server that vanished was missed after %v", took.Round(time.Second))
	if took > noticed {
		t.Errorf("that is more than the %v that are documented, and some for a slow machine", noticed)
	}
}

// noticed is within what time a server is missed that vanishes without a word: 25 seconds, and some
// more for a slow machine.
const noticed = 30 * time.Second
