package nbdnl_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// ioctlWorld is the real kernel, told by ioctls.
func ioctlWorld(t *testing.T) world {
	t.Helper()
	nbdnltest.RequireKernel(t)
	return world{T: t, Client: newClient(t, nbdnl.System{Mode: nbdnl.ModeIoctl}), mode: nbdnl.ModeIoctl}
}

// doItThread returns the thread that keeps the device connected.
func (w world) doItThread(index int) int {
	w.Helper()
	if tid := w.status(index).OwnerTID; tid != 0 {
		return tid
	}
	// Before Linux 6.1 it can't be read. It is the one that takes no signals, of which SIGURG has a
	// bit that no thread of the runtime's masks.
	for _, tid := range threads(w.T) {
		status, err := os.ReadFile(filepath.Join("/proc/self/task", strconv.Itoa(tid), "status"))
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(status), "\nSigBlk:\t")
		line, _, _ := strings.Cut(rest, "\n")
		mask, err := strconv.ParseUint(line, 16, 64)
		if err == nil && mask&(1<<(unix.SIGURG-1)) != 0 {
			return tid
		}
	}
	w.Fatal("no thread is in NBD_DO_IT")
	return 0
}

func (w world) isLive(index int) bool {
	s := w.status(index)
	return s.State == nbdnl.StateLive
}

// wantEnd checks that the thread comes to an end.
func (w world) wantEnd(tid int) {
	w.Helper()
	if tid == os.Getpid() {
		w.Fatal("the thread is the process's first, which never ends")
	}
	for patience := time.Now().Add(soon); slices.Contains(threads(w.T), tid); <-time.After(5 * time.Millisecond) {
		if time.Now().After(patience) {
			w.Fatalf("thread %d has not ended", tid)
		}
	}
}

// The thread in NBD_DO_IT outlives every signal, and the device with it.
func TestKernelIoctlSignals(t *testing.T) {
	w := ioctlWorld(t)
	cfg, r := disk(t, 4)
	index := w.connect(cfg)
	tid := w.doItThread(index)
	f := w.open(index, os.O_RDWR|syscall.O_DIRECT)
	want := aligned(t, block)
	copy(want, bytes.Repeat([]byte("signal"), block/6))
	for i := range 200 {
		tell(t, tid, unix.SIGURG)
		tell(t, tid, unix.SIGCHLD)
		if i%50 == 0 {
			runtime.GC() // which preempts all goroutines
		}
		if _, err := f.WriteAt(want, int64(i%16)*block); err != nil {
			t.Fatal(err)
		}
	}
	if !r.begins(want) {
		t.Error("the server has other data")
	}
	w.wantState(index, nbdnl.StateLive)
	f.Close()
	w.wantDetached(index, cfg.Identifier)
	w.wantEnd(tid)
}

// However a device ends, so does its thread, and the index is free.
func TestKernelIoctlEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(w world, index int, cfg nbdnl.Config, r *responder)
	}{
		{"disconnect", func(w world, index int, cfg nbdnl.Config, _ *responder) {
			w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		}},
		{"by netlink", func(w world, index int, _ nbdnl.Config, _ *responder) {
			w.wantDone("disconnect", newClient(w.T, nbdnl.System{Mode: nbdnl.ModeNetlink}).DropAny(w.Context(), index))
		}},
		{"by another's ioctls", func(w world, index int, _ nbdnl.Config, _ *responder) {
			w.wantDone("disconnect", newClient(w.T, nbdnl.System{Mode: nbdnl.ModeIoctl}).DropAny(w.Context(), index))
		}},
		{"nbd-client -d", func(w world, index int, _ nbdnl.Config, _ *responder) {
			run(w, "nbd-client", "-L", "-d", nbdnl.Path(index))
		}},
		{"the server's death", func(_ world, _ int, _ nbdnl.Config, r *responder) { r.ours.Close() }},
		{"a stop", func(w world, index int, _ nbdnl.Config, _ *responder) {
			// A stop signal is for all threads, also for those that mask it. This process goes on
			// when the thread has stopped: a signal to do so takes back one to stop that was not
			// heeded yet.
			run(w, "sh", "-c", fmt.Sprintf(`kill -STOP %[1]d
				until
					! test -e /proc/%[1]d/task/%[2]d || grep -qs '^State:.T' /proc/%[1]d/task/%[2]d/status
				do
					sleep 0.01
				done
				kill -CONT %[1]d`, os.Getpid(), w.doItThread(index)))
		}},
		{"the client's close", func(w world, _ int, _ nbdnl.Config, r *responder) {
			w.wantDone("close", w.Client.Close())
			<-r.done
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := ioctlWorld(t)
			r := serve(t)
			cfg := config(r)
			index := w.connect(cfg)
			tid := w.doItThread(index)
			tt.end(w, index, cfg, r)
			w.wantEnd(tid)
			w.Client = newClient(t, nbdnl.System{})
			w.wantState(index, nbdnl.StateIdle)
		})
	}
}

// A server that does not read keeps the kernel from announcing the end, without a timeout for ever.
// A client that closes waits for two seconds.
func TestKernelIoctlCloseBesideHungServer(t *testing.T) {
	w := ioctlWorld(t)
	r := serve(t)
	cfg := config(r)
	if cfg.Timeout = 0; !nbdnltest.Identifiers.In(t) {
		// Linux 5.10 forgets a request the sending of which is cut short by the end; only its
		// timeout ends it.
		cfg.Timeout = 5 * time.Second
	}
	index := w.connect(cfg)
	tid := w.doItThread(index)
	f := w.open(index, os.O_WRONLY|syscall.O_DIRECT)
	r.stuck.Store(true)
	p := aligned(t, mebi)
	write := async(func() error { // more than there is room for
		_, err := f.WriteAt(p, 0)
		return err
	})
	wantStuck(w, "the write", 300*time.Millisecond, write)
	begin := time.Now()
	w.wantDone("close", w.Client.Close())
	t.Logf("closed in %v", time.Since(begin))
	if err := w.within("the write", soon, write); !errors.Is(err, syscall.EIO) {
		t.Errorf("the write: %v", err)
	}
	close(r.gate)
	f.Close()
	w.wantEnd(tid)
	w.Client = newClient(t, nbdnl.System{})
	w.wantState(index, nbdnl.StateIdle)
}

// Who looks for a free device by ioctls gets one of its own, whoever else does so at the same time.
func TestKernelIoctlFreeDevice(t *testing.T) {
	nbdnltest.RequireKernel(t)
	type outcome struct {
		w     world
		cfg   nbdnl.Config
		index int
		err   error
	}
	for range 3 {
		results := make(chan outcome)
		for i := range 8 {
			mode := nbdnl.ModeIoctl
			if i%4 == 3 {
				mode = nbdnl.ModeNetlink
			}
			w := world{T: t, Client: newClient(t, nbdnl.System{Mode: mode}), mode: mode}
			cfg := config(serve(t))
			go func() {
				index, err := w.Connect(w.Context(), cfg)
				results <- outcome{w, cfg, index, err}
			}()
		}
		taken := make(map[int]bool)
		var all []outcome
		for range 8 {
			o := <-results
			if o.err != nil {
				t.Error(o.err)
				continue
			}
			if taken[o.index] {
				t.Errorf("nbd%d was given twice", o.index)
			}
			taken[o.index] = true
			all = append(all, o)
		}
		for _, o := range all {
			if s := o.w.status(o.index); s.State != nbdnl.StateLive || s.Mode != o.w.mode {
				t.Errorf("nbd%d is %v by %v, want live by %v", o.index, s.State, s.Mode, o.w.mode)
			}
			o.w.wantDone("disconnect", o.w.Drop(t.Context(), o.index, o.cfg.Identifier))
		}
	}
}

// What there is no ioctl for is refused with its reason; the rest changes in a device that is in
// use.
func TestKernelIoctlReconfigure(t *testing.T) {
	w := ioctlWorld(t)
	cfg := config(serve(t))
	cfg.DeadConnTimeout = time.Second
	var lacks *nbdnl.UnsupportedError
	if _, err := w.Connect(t.Context(), cfg); !errors.As(err, &lacks) || lacks.Reason == "" {
		t.Errorf("a dead connection timeout: %v", err)
	}
	cfg.DeadConnTimeout, cfg.ClientFlags = 0, nbdnl.DisconnectOnClose
	if _, err := w.Connect(t.Context(), cfg); !errors.As(err, &lacks) || lacks.Reason == "" {
		t.Errorf("client flags: %v", err)
	}
	cfg.ClientFlags = 0
	index := w.connect(cfg)
	f := w.open(index, os.O_RDONLY)
	size, timeout, dead := int64(4*mebi), 7*time.Second, time.Second
	possible := nbdnl.Update{Size: &size, Timeout: &timeout}
	w.wantDone("size and timeout", w.Reconfigure(t.Context(), index, cfg.Identifier, possible))
	w.wantSetting(index, "size", "8192", "it was resized in use")
	w.wantSetting(index, "queue/io_timeout", "7000", "the timeout is another")
	for name, u := range map[string]nbdnl.Update{
		"sockets":      sockets(serve(t)),
		"dead timeout": {DeadConnTimeout: &dead, Timeout: &dead},
	} {
		err := w.Reconfigure(t.Context(), index, cfg.Identifier, u)
		unsupported := errors.Is(err, errors.ErrUnsupported) && errors.As(err, &lacks)
		if !unsupported || lacks.Reason == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.wantSetting(index, "queue/io_timeout", "7000", "what is refused changes nothing")
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}

// A device whose server has gone while somebody has it open stays until that one lets go of it.
func TestKernelIoctlHusk(t *testing.T) {
	w := ioctlWorld(t)
	r := serve(t)
	cfg := config(r)
	index := w.connect(cfg)
	tid := w.doItThread(index)
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	r.ours.Close()
	w.wantEnd(tid)
	w.wantState(index, nbdnl.StateDisconnecting)
	if _, err := f.ReadAt(aligned(t, block), 0); err == nil {
		t.Error("a device without a server can be read")
	}
	w.wantError(w.ConnectIndex(t.Context(), index, config(serve(t))), nbdnl.ErrBusy)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	w.wantError(w.WaitFree(ctx, index), context.DeadlineExceeded)
	f.Close()
	w.wantDone("wait", w.WaitFree(t.Context(), index))
	w.wantState(index, nbdnl.StateIdle)
}

// Where the kernel hides its netlink family, as up to Linux 6.1 in a network namespace of one's
// own, a client finds the ioctls by itself.
func TestKernelIoctlFallback(t *testing.T) {
	nbdnltest.RequireKernel(t)
	system := nbdnltest.PrivateNetwork(t)
	system.Mode = nbdnl.ModeNetlink
	want := nbdnl.ModeNetlink
	if err := newClient(t, system).Probe(t.Context()); errors.Is(err, nbdnl.ErrNoDriver) {
		want = nbdnl.ModeIoctl
	}
	t.Logf("a namespace of its own has %v", want)

	system.Mode = nbdnl.ModeNone
	w := world{T: t, Client: newClient(t, system)}
	w.wantDone("probe", w.Probe(t.Context()))
	cfg := config(serve(t))
	index := w.connect(cfg)
	if s := w.status(index); s.Mode != want || s.State != nbdnl.StateLive {
		t.Errorf("connected as %+v", s)
	}
	watch := w.watch()
	w.wantDetached(index, cfg.Identifier)
	watch.want(index, nbdnl.EventDisconnect)
}
