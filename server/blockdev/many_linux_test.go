package blockdev_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// NBD_TEST_MANY_DEVICES and NBD_TEST_MANY_FILES set how many devices TestKernelManyEnd ends, and
// how many files are open beside them: make bench-many has 200 and 20,000.
func many(t *testing.T, variable string, usual int) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// connectMany connects n devices of a pool at once, and returns them.
func connectMany(t *testing.T, p *blockdev.Pool, n int) []*blockdev.Device {
	t.Helper()
	devices := make([]*blockdev.Device, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			d, err := p.Connect(t.Context(), newRecorder(64<<10), blockdev.Options{})
			if err != nil {
				t.Error(err)
			}
			devices[i] = d
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return devices
}

// leaveMany connects n devices, and waits to be killed.
func leaveMany(t *testing.T, n int) {
	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "many"})
	if err != nil {
		t.Fatal(err)
	}
	connectMany(t, p, n)
	fmt.Println("ready")
	<-t.Context().Done()
}

// openFiles opens n files, and waits to be killed.
func openFiles(t *testing.T, n int) {
	limit := syscall.Rlimit{Cur: uint64(n) + 100, Max: uint64(n) + 100}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "file")
	for range n {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	fmt.Println("ready")
	<-t.Context().Done()
}

// anotherReady starts another process, and waits until it is ready.
func anotherReady(t *testing.T, role string) *exec.Cmd {
	t.Helper()
	cmd, out := another(t, role)
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("%s: %q, %v", role, line, err)
	}
	return cmd
}

// TestKernelManyEnd ends many devices at once, beside many open files: those that a killed process
// has left, and living ones. To find out who uses them takes a look at every file of every process,
// which is not taken once for each device.
func TestKernelManyEnd(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	devices := many(t, "NBD_TEST_MANY_DEVICES", 48)
	anotherReady(t, fmt.Sprintf("open %d", many(t, "NBD_TEST_MANY_FILES", 2000)))
	begin := time.Now()
	if _, err := holder.Find(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	t.Logf("a look at all processes takes %v", time.Since(begin))

	p, err := blockdev.NewPool(blockdev.PoolOptions{Name: "many", Client: c})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	alive := connectMany(t, p, devices)
	begin = time.Now()
	var wg sync.WaitGroup
	for _, d := range alive {
		wg.Go(func() {
			if err := d.Disconnect(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d devices disconnected in %v", devices, time.Since(begin))
	for _, d := range alive {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}

	killed := anotherReady(t, fmt.Sprintf("leave %d", devices))
	killed.Process.Kill()
	killed.Wait()
	begin = time.Now()
	reclaimed, err := p.Reclaim(t.Context())
	took := time.Since(begin)
	if errors.Is(err, errors.ErrUnsupported) { // before Linux 5.14, where nothing shows whose they are
		reclaimed = detachLeased(t, c)
		_, err = p.Reclaim(t.Context())
	}
	if err != nil || len(reclaimed) != devices {
		t.Errorf("reclaimed %d of %d, error %v", len(reclaimed), devices, err)
	}
	t.Logf("%d devices reclaimed in %v", len(reclaimed), took)
	checkNoneLeft(t, "many:")
}

// detachLeased ends the devices on leased indexes, whosever they are, and returns their indexes.
func detachLeased(t *testing.T, c *nbdnl.Client) []int {
	t.Helper()
	indexes, err := claim.Dir("").Leased()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for _, index := range indexes {
		all.Go(func() {
			if err := c.Detach(t.Context(), index, nbdnl.DetachOptions{Any: true, Dead: true}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	return indexes
}
