package main

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestMain is the program itself when the test starts it.
func TestMain(m *testing.M) {
	if os.Getenv("HANDOVER_PROGRAM") != "" {
		main()
		return
	}
	os.Exit(nbdnltest.Main(m))
}

// times is how many an environment variable asks for, or else few.
func times(variable string, few int) int {
	if n, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return n
	}
	return few
}

// A program is one that runs.
type program struct {
	*exec.Cmd
	ended <-chan error // of a Wait that was begun; nil: none was
}

// command is the program.
func command(t *testing.T, image, socket string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, image, socket)
	cmd.Env = append(os.Environ(), "HANDOVER_PROGRAM=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// start starts one, and returns when it serves the device.
func start(t *testing.T, image, socket string) (p *program, dev string) {
	t.Helper()
	p = new(program)
	p.Cmd = command(t, image, socket)
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%v, %v", err, p.Wait())
	}
	return p, strings.TrimSpace(line)
}

// wait returns where the end of the program is told, once.
func (p *program) wait() <-chan error {
	if p.ended == nil {
		ended := make(chan error, 1)
		p.ended = ended
		go func() { ended <- p.Wait() }()
	}
	return p.ended
}

// keeps reports whether the program still serves the device, which nobody else does: it does so,
// or ends in order, for it has handed the device over.
func (p *program) keeps(t *testing.T, index int) bool {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for before, deadline := writes(t, index), time.Now().Add(time.Minute); time.Now().Before(deadline); {
		select {
		case err := <-p.wait():
			if err != nil {
				t.Errorf("the program: %v", err)
			}
			return false
		case <-tick.C:
			if writes(t, index) >= before+50 {
				return true
			}
		}
	}
	t.Fatal("the program neither serves the device nor ends")
	return false
}

// ends waits for the end of a program, which is to be in order.
func (p *program) ends(t *testing.T) {
	t.Helper()
	if err := <-p.wait(); err != nil {
		t.Errorf("the program: %v", err)
	}
}

// disk makes an image, and returns its directory, its path and that of a socket.
func disk(t *testing.T) (dir, image, socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "handover")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image = filepath.Join(dir, "image")
	sh(t, "truncate -s 32M "+image)
	return dir, image, filepath.Join(dir, "s")
}

func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestKernelHandover upgrades the program again and again while the device is written and verified:
// there is no error, no byte is wrong, and each pause is told.
func TestKernelHandover(t *testing.T) {
	nbdnltest.RequireKernel(t)
	upgrades := times("NBD_TEST_UPGRADES", 10)
	dir, image, socket := disk(t)
	p, dev := start(t, image, socket)
	index, err := nbdnl.ParseIndex(dev)
	if err != nil {
		t.Fatal(err)
	}
	incarnation := nbdnl.IncarnationOf(index)

	unload := load(t, dir, dev)
	var longest atomic.Int64 // of a read, in nanoseconds
	stop, probed := make(chan struct{}), make(chan error, 1)
	go func() { probed <- probe(dev, &longest, stop) }()

	var pauses, usual []time.Duration
	for range upgrades {
		longest.Store(0)
		goesOn(t, index)
		usual = append(usual, time.Duration(longest.Swap(0)))
		next, path := start(t, image, socket)
		p.ends(t)
		if path != dev || nbdnl.IncarnationOf(index) != incarnation {
			t.Fatalf("the device is %s, and was %s", path, dev)
		}
		pauses = append(pauses, time.Duration(longest.Load()))
		p = next
	}
	unload()
	close(stop)
	if err := <-probed; err != nil {
		t.Errorf("a read: %v", err)
	}
	slices.Sort(pauses)
	slices.Sort(usual)
	t.Logf("%d upgrades: the longest read took %v (median), at most %v; between two of them %v, at most %v",
		upgrades, pauses[upgrades/2], pauses[upgrades-1], usual[upgrades/2], usual[upgrades-1])

	sh(t, fmt.Sprintf("head -c 8M /dev/urandom | dd of=%s bs=64k seek=384 iflag=fullblock status=none", dev)) // cached
	p.disconnects(t, dev, image)
	if nbdnl.IncarnationOf(index) != 0 {
		t.Errorf("%s is still connected", dev)
	}
}

// TestKernelHandoverKilled kills the program that serves the device, and successors at any moment
// of a handover, while the device is written and verified: whoever uses it waits, and no byte is
// wrong.
func TestKernelHandoverKilled(t *testing.T) {
	nbdnltest.RequireKernel(t)
	nbdnltest.Identifiers.Need(t)
	rounds := times("NBD_TEST_KILLS", 4)
	dir, image, socket := disk(t)
	p, dev := start(t, image, socket)
	index, err := nbdnl.ParseIndex(dev)
	if err != nil {
		t.Fatal(err)
	}
	unload := load(t, dir, dev)
	attached, kept := 0, 0
	for round := range rounds {
		goesOn(t, index)
		if round%2 == 0 {
			p.Process.Kill()
			<-p.wait()
			attached++
		} else {
			next := command(t, image, socket)
			if err := next.Start(); err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(rand.N(500*time.Millisecond), func() { next.Process.Kill() })
			_ = next.Wait()
			if p.keeps(t, index) {
				kept++
				continue
			}
			attached++
		}
		before := time.Now()
		var path string
		if p, path = start(t, image, socket); path != dev {
			t.Fatalf("round %d: the device is %s, and was %s", round, path, dev)
		}
		t.Logf("round %d: served again after %v", round, time.Since(before))
	}
	unload()
	p.disconnects(t, dev, image)
	t.Logf("%d times the device was attached, %d times the program has kept it", attached, kept)
}

// disconnects ends a program in order, and holds that the image has what the device had.
func (p *program) disconnects(t *testing.T, dev, image string) {
	t.Helper()
	sum := sh(t, "sha256sum <"+dev)
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.ends(t)
	if got := sh(t, "sha256sum <"+image); got != sum {
		t.Errorf("the image has %s, the device had %s", got, sum)
	}
}

// load writes to the device and verifies what it has written, until it is told to stop. It must not
// fail.
func load(t *testing.T, dir, dev string) (stop func()) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", "while ! test -e "+dir+"/stop; do fio --name=verify --filename="+dev+
		" --size=24M --minimal --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-64k --fsync=64"+
		" --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=128 --verify_state_save=0 >/dev/null; done")
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		sh(t, "touch "+dir+"/stop")
		if err := cmd.Wait(); err != nil {
			t.Errorf("the load: %v: %s", err, said.String())
		}
	}
}

// goesOn waits until some more is written to the device.
func goesOn(t *testing.T, index int) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for before, deadline := writes(t, index), time.Now().Add(time.Minute); writes(t, index) < before+50; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("nothing is written any more")
		}
	}
}

// writes returns how many the device has had.
func writes(t *testing.T, index int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/stat", index))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.Fields(string(b))[4])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// probe reads the device all the time, and notes how long that takes at the most.
func probe(dev string, longest *atomic.Int64, stop <-chan struct{}) error {
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 4096)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		begin := time.Now()
		// What is cached would come from the cache.
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return err
		}
		if _, err := f.ReadAt(p, 28<<20); err != nil {
			return err
		}
		longest.Store(max(longest.Load(), int64(time.Since(begin))))
	}
}
