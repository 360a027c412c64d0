package blockdev_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// poolDevices and poolRounds are what TestKernelPoolMany does. NBD_TEST_POOL_ROUNDS sets the
// latter.
const poolDevices = 64

func poolRounds(t *testing.T) int {
	t.Helper()
	s := os.Getenv("NBD_TEST_POOL_ROUNDS")
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// another starts this test binary again, to do what TestKernelPoolProcess does for role.
func another(t *testing.T, role string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run", "^TestKernelPoolProcess$", "-test.timeout", "1h")
	cmd.Env = append(os.Environ(), poolRole+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, bufio.NewReader(out)
}

// TestKernelPoolProcess is the other processes of the tests below.
func TestKernelPoolProcess(t *testing.T) {
	nbdnltest.RequireKernel(t)
	role, count, _ := strings.Cut(os.Getenv(poolRole), " ")
	n, _ := strconv.Atoi(count) // of the roles that have none, 0
	switch role {
	case "":
		// There is nothing to do for the test of this name.
	case "die":
		leaveDevices(t)
	case "leave":
		leaveMany(t, n)
	case "open":
		openFiles(t, n)
	case "use":
		manyDevices(t, n, poolRounds(t))
	default:
		t.Fatalf("role %q", role)
	}
}

// manyDevices has n devices at a time attached, written, verified and detached, each by a goroutine
// of its own.
func manyDevices(t *testing.T, n, rounds int) {
	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "many", Warm: min(n, 16)})
	if err != nil {
		t.Fatal(err)
	}
	for round := range rounds {
		var wg sync.WaitGroup
		var barrier sync.WaitGroup // so that all are there at the same time
		barrier.Add(n)
		for i := range n {
			wg.Go(func() {
				arrived := sync.OnceFunc(barrier.Done)
				defer arrived()
				content := fmt.Sprintf("%d, %d, %d;", os.Getpid(), round, i)
				if err := oneDevice(t, p, content, func() { arrived(); barrier.Wait() }); err != nil {
					t.Errorf("round %d, device %d: %v", round, i, err)
				}
			})
		}
		wg.Wait()
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// oneDevice has a device of a backend that nobody else has, fills it with a mark, and holds that
// the mark, and nothing else, has come to that backend and comes back from it.
func oneDevice(t *testing.T, p *blockdev.Pool, mark string, together func()) (err error) {
	const size = 256 << 10
	b := newRecorder(size)
	d, err := p.Connect(t.Context(), b, blockdev.Options{Identifier: nbdnl.NewIdentifier("many")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	together()
	want := bytes.Repeat([]byte(mark), size/len(mark)+1)[:size]
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(want, 0)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if !bytes.Equal(b.stored(0, size), want) {
		return fmt.Errorf("%s: the backend has something else", d.Path())
	}
	// Behind the kernel's back: what is read comes from here.
	binary.BigEndian.PutUint64(want[4096:], 0x1122334455667788)
	b.disk.WriteAt(want[4096:4104], 4096)
	f, err = os.OpenFile(d.Path(), os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	q := aligned(t, 4096)
	for off := int64(0); off < size; off += 4096 {
		if _, err := f.ReadAt(q, off); err != nil {
			return err
		}
		if !bytes.Equal(q, want[off:off+4096]) {
			return fmt.Errorf("%s: block at %d reads back as another's", d.Path(), off)
		}
	}
	return nil
}

// checkNoneLeft fails the test if a device is connected that carries an identifier with that
// prefix, or a lease is there.
func checkNoneLeft(t *testing.T, prefix string) {
	t.Helper()
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	devices, err := c.Connected()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range devices {
		if strings.HasPrefix(s.Identifier, prefix) {
			t.Errorf("%s is left, %s", nbdnl.Path(s.Index), s.Identifier)
		}
	}
	if leases, err := claim.Dir("").Leased(); err != nil || len(leases) > 0 {
		t.Errorf("leases of %v are left, error %v", leases, err)
	}
}

// TestKernelPoolMany has 64 devices at a time, from one process and from eight: four times as many
// as the module has made.
func TestKernelPoolMany(t *testing.T) {
	nbdnltest.RequireKernel(t)
	t.Run("one process", func(t *testing.T) {
		manyDevices(t, poolDevices, poolRounds(t))
		checkNoneLeft(t, "many:")
	})
	t.Run("eight processes", func(t *testing.T) {
		const processes = 8
		var wg sync.WaitGroup
		for range processes {
			cmd, out := another(t, fmt.Sprintf("use %d", poolDevices/processes))
			wg.Go(func() {
				said, _ := io.ReadAll(out)
				if err := cmd.Wait(); err != nil {
					t.Errorf("%v\n%s", err, said)
				}
			})
		}
		wg.Wait()
		checkNoneLeft(t, "many:")
	})
}

// leaveDevices connects two devices by a pool and one without, and waits to be killed.
func leaveDevices(t *testing.T) {
	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "left", Warm: 2})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d, err := p.Connect(t.Context(), newRecorder(1<<20), blockdev.Options{})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(d.Index(), d.Identifier())
	}
	o := blockdev.Options{Identifier: nbdnl.NewIdentifier("left")}
	d, err := blockdev.Connect(t.Context(), newRecorder(1<<20), o)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(d.Index(), d.Identifier())
	<-t.Context().Done()
}

// TestKernelPoolReclaim kills a process that has devices: a pool of the same name takes back those
// that were leased, once the process is dead, and nothing else.
func TestKernelPoolReclaim(t *testing.T) {
	nbdnltest.RequireKernel(t)
	cmd, out := another(t, "die")
	var indexes [3]int
	var ids [3]string
	for i := range indexes {
		if _, err := fmt.Fscanln(out, &indexes[i], &ids[i]); err != nil {
			t.Fatal(err)
		}
	}
	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "left"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if got, err := p.Reclaim(t.Context()); len(got) > 0 || err != nil {
		t.Errorf("reclaimed %v of a living process, error %v", got, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	other, err := p.Connect(t.Context(), newRecorder(1<<20), blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for i, index := range indexes {
		if other.Index() == index {
			t.Errorf("nbd%d was given out before it was reclaimed (device %d)", index, i)
		}
	}
	left, leftErr := p.Left(t.Context())
	held, err := os.Open(nbdnl.Path(indexes[1]))
	if err == nil {
		defer held.Close()
	}
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if st, err := c.Status(t.Context(), indexes[0]); err != nil || !st.HasIdentifier {
		// Before Linux 5.14 nothing shows whose it is.
		if got, err := p.Reclaim(t.Context()); len(got) > 0 || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("reclaimed %v, error %v, want ErrUnsupported", got, err)
		}
		if len(left) > 0 || !errors.Is(leftErr, errors.ErrUnsupported) {
			t.Errorf("left are %v, error %v, want ErrUnsupported", left, leftErr)
		}
		held.Close()
		for _, index := range indexes {
			if err := c.Detach(t.Context(), index, nbdnl.DetachOptions{Any: true, Dead: true}); err != nil {
				t.Error(err)
			}
		}
		if _, err := p.Reclaim(t.Context()); err != nil {
			t.Errorf("what has ended can't be reclaimed: %v", err)
		}
		return
	}
	if len(left) != 2 || leftErr != nil {
		t.Fatalf("left are %v, error %v, want two devices", left, leftErr)
	}
	for _, s := range left {
		i := slices.Index(indexes[:2], s.Index)
		if i < 0 || s.Identifier != ids[i] || s.Size != 1<<20 || s.State != nbdnl.StateOrphaned {
			t.Errorf("left is %+v, want one of %v, of 1 MiB, orphaned", s, ids[:2])
		}
	}
	got, err := p.Reclaim(t.Context())
	var busy *nbdnl.BusyError
	if len(got) != 1 || got[0] != indexes[0] || !errors.As(err, &busy) || busy.Index != indexes[1] {
		t.Errorf("reclaimed %v, error %v, want %d, and that %d is held", got, err, indexes[0], indexes[1])
	}
	held.Close()
	if got, err := p.Reclaim(t.Context()); len(got) != 1 || got[0] != indexes[1] || err != nil {
		t.Errorf("reclaimed %v, error %v, want %d", got, err, indexes[1])
	}
	if st, err := c.Status(t.Context(), indexes[2]); err != nil || st.Identifier != ids[2] {
		t.Errorf("what was not the pool's is %s, %q, error %v", st.State, st.Identifier, err)
	}
	if err := c.Detach(t.Context(), indexes[2], nbdnl.DetachOptions{Identifier: ids[2], Dead: true}); err != nil {
		t.Error(err)
	}
	if got := p.Stats(); got != (blockdev.PoolStats{InUse: 1}) {
		t.Errorf("stats are %+v, want one device in use", got)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- other.Close() }()
	if err := errors.Join(p.Wait(t.Context()), <-closed); err != nil {
		t.Error(err)
	}
	checkNoneLeft(t, "left:")
}

// TestKernelPoolProbed connects while somebody opens every device again and again, as udev does.
func TestKernelPoolProbed(t *testing.T) {
	nbdnltest.RequireKernel(t)
	ctx, cancel := context.WithCancel(t.Context())
	var prober sync.WaitGroup
	prober.Go(func() {
		for ctx.Err() == nil {
			for index := range 24 {
				if f, err := os.Open(nbdnl.Path(index)); err == nil {
					<-time.After(2 * time.Millisecond)
					f.Close()
				}
			}
		}
	})
	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "probed", Warm: 4})
	if err != nil {
		t.Fatal(err)
	}
	for range 8 {
		if err := oneDevice(t, p, "probed;", func() {}); err != nil {
			t.Error(err)
		}
	}
	cancel()
	prober.Wait()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	checkNoneLeft(t, "probed:")
}
