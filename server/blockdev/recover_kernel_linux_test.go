package blockdev_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const recoverSize = 16 << 20 // of the device, in bytes

// A report is what a process that serves the device says to the keeper, with descriptors.
type report struct {
	Document       blockdev.Document
	Kept, Replaced int
	Took           time.Duration // by Recover
}

// send sends a message with descriptors. It does not call Fd, which would have all who share a
// socket wait in its calls.
func send(c *net.UnixConn, p []byte, files []*os.File) error {
	fds := make([]int, len(files))
	for i, f := range files {
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return err
		}
	}
	_, _, err := c.WriteMsgUnix(p, unix.UnixRights(fds...), nil)
	return err
}

// TestKernelRecoverProcess is the processes that serve the device of the test below.
func TestKernelRecoverProcess(t *testing.T) {
	nbdnltest.RequireKernel(t)
	role, _, _ := strings.Cut(os.Getenv(poolRole), " ")
	if role == "" {
		return // There is nothing to do for the test of this name.
	}
	nc, err := net.FileConn(os.NewFile(3, "keeper"))
	if err != nil {
		t.Fatal(err)
	}
	keeper := nc.(*net.UnixConn)
	var n, connections int
	if _, err := fmt.Sscan(strings.TrimPrefix(os.Getenv(poolRole), role), &n, &connections); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for i := range n {
		files = append(files, os.NewFile(uintptr(4+i), "file"))
	}
	disk, err := memory.Inherit(recoverSize, files[:2], memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := blockdev.Options{
		Connections: connections, Recoverable: true, Timeout: 3 * time.Second, DeadTimeout: time.Minute,
	}
	var r report
	var d *blockdev.Device
	if role == "connect" {
		d, err = blockdev.Connect(t.Context(), disk, o)
	} else {
		if err := json.Unmarshal([]byte(os.Getenv("NBD_TEST_KEPT")), &r.Document); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		d, err = blockdev.Recover(t.Context(), r.Document, files[2:], disk, o)
		r.Took = time.Since(start)
		for _, f := range files[2:] {
			f.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Kept, r.Replaced = d.Recovered()
	asked := make(chan struct{})
	go func() { // The keeper wants no more of it.
		defer close(asked)
		keeper.Read(make([]byte, 1))
	}()
	for {
		doc, files, err := d.Keep()
		if err != nil {
			t.Fatal(err)
		}
		r.Document = doc
		p, err := json.Marshal(r)
		if err == nil {
			err = send(keeper, p, files)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			f.Close()
		}
		select {
		case <-d.Changes():
		case <-d.Done():
			t.Fatal(d.Err())
		case <-asked:
			if err := d.Disconnect(t.Context()); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

// A keeper holds what is needed to go on with a device.
type keeper struct {
	connections int
	memory      []*os.File

	cmd    *exec.Cmd
	conn   *net.UnixConn
	ready  chan report   // the first of the process
	silent chan struct{} // closed when the process says nothing more

	mu    sync.Mutex // guards all below
	last  report
	files []*os.File
}

// start starts a process that serves the device, and returns what it says when it does.
func (k *keeper) start(t *testing.T, role string) report {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "keeper"), os.NewFile(uintptr(pair[1]), "process")
	defer theirs.Close()
	nc, err := net.FileConn(ours)
	if err := errors.Join(err, ours.Close()); err != nil {
		t.Fatal(err)
	}
	k.conn = nc.(*net.UnixConn)
	files := append(slices.Clone(k.memory), k.files...)
	kept, err := json.Marshal(k.last.Document)
	if err != nil {
		t.Fatal(err)
	}
	k.cmd = exec.Command(os.Args[0], "-test.run", "^TestKernelRecoverProcess$", "-test.timeout", "1h")
	k.cmd.Env = append(os.Environ(), fmt.Sprint(poolRole, "=", role, " ", len(files), " ", k.connections),
		"NBD_TEST_KEPT="+string(kept))
	k.cmd.ExtraFiles = append([]*os.File{theirs}, files...)
	var said bytes.Buffer
	k.cmd.Stdout, k.cmd.Stderr = &said, &said
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k.ready, k.silent = make(chan report, 1), make(chan struct{})
	go k.listen(k.conn, k.ready, k.silent)
	select {
	case r := <-k.ready:
		return r
	case <-k.silent:
		t.Fatalf("the process: %v\n%s", k.cmd.Wait(), &said)
	case <-time.After(time.Minute):
		k.cmd.Process.Kill()
		t.Fatalf("the process does not come to serve the device: %v\n%s", k.cmd.Wait(), &said)
	}
	panic("not reached")
}

// listen takes over what a process says, until it ends.
func (k *keeper) listen(c *net.UnixConn, ready chan<- report, silent chan<- struct{}) {
	defer close(silent)
	p, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*64))
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(p, oob)
		var r report
		if err != nil || n == 0 || json.Unmarshal(p[:n], &r) != nil {
			return
		}
		var files []*os.File
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range messages {
			fds, _ := unix.ParseUnixRights(&messages[i])
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "kept"))
			}
		}
		k.mu.Lock()
		for _, f := range k.files {
			f.Close()
		}
		k.last, k.files = r, files
		k.mu.Unlock()
		select {
		case ready <- r:
		default:
		}
	}
}

// kill kills the process, and has another one go on.
func (k *keeper) kill(t *testing.T) (r report, took time.Duration) {
	t.Helper()
	start := time.Now()
	if err := k.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = k.cmd.Wait() // All its threads are dead.
	<-k.silent
	k.conn.Close()
	r = k.start(t, "recover")
	return r, time.Since(start)
}

// served returns how many requests the device has had.
func served(t *testing.T, index int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/stat", index))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b))
	for _, i := range []int{0, 4} {
		m, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	return n
}

// idles waits until nobody asks the device for anything any more, as udev does when it was written.
func idles(t *testing.T, index int) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for before, same := served(t, index), 0; same < 10; <-tick.C {
		now := served(t, index)
		if same++; now != before {
			before, same = now, 0
		}
	}
}

// TestKernelRecover kills a process that serves a device in memory, at idle and at random moments
// under loads that are verified, and has another one go on with what the test keeps of it: nobody
// sees an error or a wrong byte, and an idle device keeps its connections. NBD_TEST_KILLS says how
// often.
func TestKernelRecover(t *testing.T) {
	nbdnltest.RequireKernel(t)
	rounds := 6
	if n, err := strconv.Atoi(os.Getenv("NBD_TEST_KILLS")); err == nil {
		rounds = n
	}
	for _, connections := range []int{1, 2} {
		disk, err := memory.New(recoverSize, memory.Options{})
		if err != nil {
			t.Fatal(err)
		}
		k := &keeper{connections: connections}
		if k.memory, err = disk.Files(); err != nil {
			t.Fatal(err)
		}
		first := k.start(t, "connect").Document
		t.Cleanup(func() { k.cmd.Process.Kill() })
		path := fmt.Sprintf("/dev/nbd%d", first.Index)
		for _, load := range []struct {
			name string
			args []string // of fio; nil: there is none
		}{
			{"idle", nil},
			{"one request", []string{"--iodepth=1", "--rw=randrw", "--bs=4k"}},
			{"16 requests", []string{"--iodepth=16", "--rw=randrw", "--bsrange=4k-64k", "--fsync=64"}},
		} {
			var fio *fio
			if load.args != nil {
				fio = startFio(t, append([]string{"--filename=" + path, "--size=8m"}, load.args...)...)
			}
			quick, kept := 0, 0
			var pauses, calls []time.Duration
			for round := range rounds {
				want := pattern(first.Index, round)
				if fio == nil {
					write(t, path, want)
					idles(t, first.Index)
				} else {
					for before := served(t, first.Index); served(t, first.Index) < before+200; {
						fio.moment(t, load.name+", round", round)
					}
					moment := time.NewTimer(rand.N(10 * time.Millisecond))
					<-moment.C
				}
				r, took := k.kill(t)
				if r.Document.Index != first.Index || r.Document.Incarnation != first.Incarnation {
					t.Fatalf("it goes on as %+v", r.Document)
				}
				kept += r.Kept
				if r.Replaced == 0 {
					quick++
				}
				pauses, calls = append(pauses, took), append(calls, r.Took)
				if fio == nil {
					if got := readDirect(t, path, len(want)); !bytes.Equal(got, want) {
						t.Errorf("round %d: the device has something else", round)
					}
				}
			}
			if fio != nil {
				for before := served(t, first.Index); served(t, first.Index) < before+200; {
					fio.moment(t, load.name+", at the end", rounds)
				}
				fio.stop(t)
			} else if quick != rounds {
				t.Errorf("%d connections: %d of %d that were idle were recovered at once", connections, quick, rounds)
			}
			slices.Sort(pauses)
			slices.Sort(calls)
			t.Logf("%d connections, %s: %d of %d at once, %d of %d connections kept; "+
				"from the kill on %v (median), at most %v; Recover took %v, at most %v",
				connections, load.name, quick, rounds, kept, rounds*connections,
				pauses[rounds/2], pauses[rounds-1], calls[rounds/2], calls[rounds-1])
		}
		if _, err := k.conn.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if err := k.cmd.Wait(); err != nil {
			t.Errorf("the last process: %v", err)
		}
		<-k.silent
		for _, f := range append(k.memory, k.files...) {
			f.Close()
		}
		if err := disk.Close(); err != nil {
			t.Error(err)
		}
	}
}

// pattern is 64 KiB of a round.
func pattern(index, round int) []byte {
	return bytes.Repeat([]byte{byte(1 + index), byte(1 + round), byte(rand.N(256)), 3}, 16<<10)
}

// write writes to the device, without its cache.
func write(t *testing.T, path string, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(p, 12<<20)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// readDirect reads from the device, and not from its cache.
func readDirect(t *testing.T, path string, n int) []byte {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, n)
	if _, err := f.ReadAt(p, 12<<20); err != nil {
		t.Fatal(err)
	}
	return p
}
