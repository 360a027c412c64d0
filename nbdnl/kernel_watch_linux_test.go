package nbdnl_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// A device that another program has connected by ioctls is watched like any other.
func TestKernelWatchIoctl(t *testing.T) {
	w := kernelWorld(t)
	watch := w.watch()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, mebi), 0o600); err != nil {
		t.Fatal(err)
	}
	const index = 6
	server := exec.Command("qemu-nbd", "--format=raw", "--connect="+nbdnl.Path(index), disk)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	t.Cleanup(func() { _ = server.Process.Kill() }) // it has ended, unless the test fails
	e := watch.want(index, nbdnl.EventConnect)
	if s := e.Status; s.Mode == nbdnl.ModeNetlink || s.Size != mebi || s.HasIdentifier {
		t.Errorf("connect is %+v", e)
	}
	run(t, "qemu-nbd", "--disconnect", nbdnl.Path(index))
	for {
		e, err := watch.Next()
		if err != nil {
			t.Fatal(err)
		}
		if e.Index == index && e.Kind == nbdnl.EventDisconnect {
			break
		}
	}
	w.wantDone("qemu-nbd", <-ended)
	w.wantState(index, nbdnl.StateIdle)
}

// However soon a reconfigure comes after the death of the connection, when it returns the device
// works.
func TestKernelReconnect(t *testing.T) {
	w := kernelWorld(t)
	r := serve(t)
	cfg := config(r)
	cfg.DeadConnTimeout = 30 * time.Second
	index := w.connect(cfg)
	f, err := os.OpenFile(nbdnl.Path(index), os.O_RDONLY|syscall.O_DIRECT, 0) // past the cache
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(page)
	for round := range 40 {
		next := newResponder(t)
		next.data = make([]byte, mebi)
		next.data[0] = byte(round + 1)
		next.start(t)
		r.ours.Close()
		if err := w.Reconfigure(t.Context(), index, cfg.Identifier, sockets(next)); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := f.ReadAt(page, 0); err != nil || page[0] != byte(round+1) {
			t.Fatalf("round %d: read %d, %v", round, page[0], err)
		}
		r = next
	}
}

// WaitFree learns of the end by its event, and does not come back a pause later. Nor does a watch.
func TestKernelWaitFreeIsQuick(t *testing.T) {
	for _, beside := range []string{"nothing", "udev"} {
		t.Run(beside, func(t *testing.T) {
			w := kernelWorld(t)
			if beside == "udev" {
				startUdev(t)
			}
			const rounds = 9
			var freed, seen, others []time.Duration
			for range rounds {
				a, b, c := endOnce(w)
				freed, seen, others = append(freed, a), append(seen, b), append(others, c)
			}
			slices.Sort(freed)
			slices.Sort(seen)
			slices.Sort(others)
			t.Logf("WaitFree returns after %v, Next after %v; a look at sysfs then takes %v", freed, seen, others)
			// Polling at intervals of up to 50 ms would take 25 ms at the median, and on a slow
			// machine longer. What udev does meanwhile keeps the only processor from everybody.
			limit := 20*time.Millisecond + 20*readTime(t) + 2*others[rounds/2]
			if waited, watched := freed[rounds/2], seen[rounds/2]; waited > limit || watched > limit {
				t.Errorf("half of the times WaitFree returns after %v or more, Next after %v, limit is %v",
					waited, watched, limit)
			}
		})
	}
}

// endOnce lets go of a disconnected device, and returns how long it takes until that is known, and
// how long it takes then to look at something.
func endOnce(w world) (freed, seen, other time.Duration) {
	w.Helper()
	cfg := config(serve(w))
	index := w.connect(cfg)
	f, err := os.Open(nbdnl.Path(index))
	if err != nil {
		w.Fatal(err)
	}
	watch := w.watch()
	defer watch.Close()
	w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
	free, end := make(chan time.Time, 1), make(chan time.Time, 1)
	go func() {
		w.wantDone("wait", w.WaitFree(w.Context(), index))
		free <- time.Now()
	}()
	go func() {
		for {
			e, err := watch.Next()
			if err != nil {
				w.Errorf("watch: %v", err)
			}
			if err != nil || e.Index == index && e.Kind == nbdnl.EventDisconnect {
				end <- time.Now()
				return
			}
		}
	}()
	<-time.After(200 * time.Millisecond) // so that pauses, if there were any, would be long
	look, looked := make(chan struct{}), make(chan time.Time, 1)
	go func() {
		<-look
		<-time.After(time.Millisecond)
		_, _ = os.ReadFile("/sys/block/nbd0/size")
		looked <- time.Now()
	}()
	begin := time.Now()
	f.Close()
	close(look)
	return (<-free).Sub(begin), (<-end).Sub(begin), (<-looked).Sub(begin)
}

// startUdev runs udev, which opens each device that changes, until the end of the test.
func startUdev(t *testing.T) {
	t.Helper()
	if os.Getenv("NBD_LAB") == "" {
		t.Log("not in the lab: whatever udev this machine has is what there is")
		return
	}
	udevd, err := filepath.Abs("../testdata/lab/udevd")
	if err != nil {
		t.Fatal(err)
	}
	run(t, udevd, "start")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if out, err := exec.CommandContext(ctx, udevd, "stop").CombinedOutput(); err != nil {
			t.Error(fmt.Errorf("udev: %w: %s", err, out))
		}
	})
}

// A cache that the administrator has switched off stays off for the next user of the index from
// Linux 6.10 on, and then the kernel would not send a flush. Earlier drivers switch it on again.
func TestKernelConnectWithoutFlush(t *testing.T) {
	w := kernelWorld(t)
	const index = 9
	cache := "/sys/block/nbd9/queue/write_cache"
	cfg := config(serve(t))
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, cfg))
	if err := os.WriteFile(cache, []byte("write through"), 0); err != nil {
		t.Fatal(err)
	}
	if w.status(index).Flags&nbdnl.FlagSendFlush != 0 {
		t.Error("flush is in force without a cache")
	}
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	w.wantState(index, nbdnl.StateIdle)

	cfg = config(serve(t))
	err := w.ConnectIndex(t.Context(), index, cfg)
	t.Logf("connect: %v", err)
	nbdnltest.StickyCache.Seen(t, err != nil)
	var unsupported *nbdnl.UnsupportedError
	if err == nil {
		if w.status(index).Flags&nbdnl.FlagSendFlush == 0 {
			t.Error("connected without flush")
		}
		w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
		return
	}
	if !errors.As(err, &unsupported) || unsupported.Setting != "flush" || unsupported.Index != index {
		t.Errorf("error is %v", err)
	}
	w.wantState(index, nbdnl.StateIdle)

	// One that does not need the flush gets the index, and can switch the cache on for those that
	// come.
	cfg = config(serve(t))
	cfg.Flags = 0
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, cfg))
	w.wantDone("cache", os.WriteFile(cache, []byte("write back"), 0))
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	w.wantState(index, nbdnl.StateIdle)
	cfg = config(serve(t))
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, cfg))
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
}

// The end of the module is not the end of a watch.
func TestKernelWatchReload(t *testing.T) {
	w := kernelWorld(t)
	if os.Getenv("NBD_LAB") == "" {
		t.Log("not in the lab: this machine's module is left alone")
		return
	}
	watch := w.watch()
	// A device holds the module until a moment after it is free (nbd_config_put).
	for patience := time.Now().Add(soon); ; <-time.After(5 * time.Millisecond) {
		references, err := os.ReadFile("/sys/module/nbd/refcnt")
		if err != nil {
			t.Fatal(err)
		}
		if string(references) == "0\n" || time.Now().After(patience) {
			break
		}
	}
	run(t, "modprobe", "-C", "/dev/null", "-r", "nbd")
	run(t, "modprobe", "-C", "/dev/null", "nbd")
	r := serve(t)
	cfg := config(r)
	index := w.connect(cfg)
	for {
		e, err := watch.Next()
		if err != nil {
			t.Fatal(err)
		}
		if e.Index == index && e.Kind == nbdnl.EventConnect {
			break
		}
	}
	r.ours.Close()
	watch.want(index, nbdnl.EventLinkDead)
}
