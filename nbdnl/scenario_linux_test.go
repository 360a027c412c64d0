package nbdnl_test

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// A world is a kernel to act on, the fake one or a real one: both must answer each scenario alike.
type world struct {
	*testing.T
	*nbdnl.Client
	// hold opens a device like any other program.
	hold func(index int) (release func())
	// cut ends a connection of the device at the server's end.
	cut func(index int, r *responder)
	// another returns another program's client.
	another func() *nbdnl.Client
	// anonymous: the kernel keeps no identifiers, so that devices are known to those only who have connected them.
	anonymous bool
	// mode is how devices are connected.
	mode nbdnl.Mode
}

func TestScenarios(t *testing.T) {
	runScenarios(t, func(t *testing.T, mode nbdnl.Mode) world {
		t.Setenv("NBDCTL_STATE_DIR", "") // the fake's is below its own root
		k := nbdnltest.New(t, nbdnltest.Options{})
		system := k.System()
		system.Mode = mode
		client := func() *nbdnl.Client { return newClient(t, system) }
		return world{T: t, Client: client(), another: client, hold: func(index int) func() {
			_, release := k.Hold(index)
			t.Cleanup(release)
			return release
		}, cut: func(index int, r *responder) {
			r.ours.Close()
			k.LinkDead(index)
		}, mode: mode}
	})
}

func TestKernelScenarios(t *testing.T) {
	nbdnltest.RequireKernel(t)
	anonymous := !nbdnltest.Identifiers.In(t)
	runScenarios(t, func(t *testing.T, mode nbdnl.Mode) world {
		client := func() *nbdnl.Client { return newClient(t, nbdnl.System{Mode: mode}) }
		return world{T: t, Client: client(), another: client, hold: func(index int) func() {
			f, err := os.Open(nbdnl.Path(index))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return func() { f.Close() }
		}, cut: func(_ int, r *responder) { r.ours.Close() }, mode: mode, anonymous: anonymous}
	})
}

// runScenarios runs each scenario by each interface that it is for.
func runScenarios(t *testing.T, make func(*testing.T, nbdnl.Mode) world) {
	for _, mode := range []nbdnl.Mode{nbdnl.ModeNetlink, nbdnl.ModeIoctl} {
		t.Run(mode.String(), func(t *testing.T) {
			for _, s := range scenarios {
				if s.needs == nbdnl.ModeNone || s.needs == mode {
					t.Run(s.name, func(t *testing.T) { s.run(make(t, mode)) })
				}
			}
		})
	}
}

func newClient(t *testing.T, system nbdnl.System) *nbdnl.Client {
	t.Helper()
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// mebi is the size of the scenarios' devices.
const mebi = 1 << 20

// config returns a valid configuration with the responders' sockets.
func config(responders ...*responder) nbdnl.Config {
	cfg := nbdnl.Config{
		Size:       mebi,
		BlockSize:  512,
		Flags:      nbdnl.FlagSendFlush,
		Timeout:    5 * time.Second,
		Identifier: nbdnl.NewIdentifier("test"),
	}
	for _, r := range responders {
		cfg.Sockets = append(cfg.Sockets, r.kernel)
	}
	return cfg
}

// connect connects a device, which is disconnected with the test at the latest.
func (w world) connect(cfg nbdnl.Config) int {
	w.Helper()
	index, err := w.Connect(w.Context(), cfg)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		// Already gone where the scenario has disconnected it.
		_ = w.Disconnect(context.Background(), index, cfg.Identifier)
	})
	return index
}

func (w world) status(index int) nbdnl.Status {
	w.Helper()
	s, err := w.Status(w.Context(), index)
	if err != nil {
		w.Fatal(err)
	}
	return s
}

// wantState waits until the device is in that state: udev may be looking at it, which makes it held or
// keeps it from going idle.
func (w world) wantState(index int, want nbdnl.State) {
	w.Helper()
	s := w.status(index)
	for patience := time.Now().Add(3 * time.Second); s.State != want && time.Now().Before(patience); s = w.status(index) {
		<-time.After(5 * time.Millisecond)
	}
	if s.State != want {
		w.Errorf("%s is %v, want %v", nbdnl.Path(index), s.State, want)
	}
}

func (w world) wantError(err error, targets ...error) {
	w.Helper()
	for _, target := range targets {
		if !errors.Is(err, target) {
			w.Errorf("error is %v, want one that matches %v", err, target)
		}
	}
}

// wantNotOwner checks that a command with another identifier than the device's was refused.
func (w world) wantNotOwner(err error) {
	w.Helper()
	if w.anonymous {
		w.wantError(err, errors.ErrUnsupported) // whose it is can't be told
		return
	}
	w.wantError(err, nbdnl.ErrNotOwner)
}

func (w world) wantDone(what string, err error) {
	w.Helper()
	if err != nil {
		w.Errorf("%s: %v", what, err)
	}
}

var scenarios = []struct {
	name  string
	needs nbdnl.Mode // the only interface that can do it; ModeNone: both can
	run   func(w world)
}{
	{"connect, look, disconnect", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		cfg := config(r)
		index := w.connect(cfg)
		want := nbdnl.Status{
			Index: index, State: nbdnl.StateLive, Size: mebi, BlockSize: 512, Mode: w.mode,
			Flags: nbdnl.FlagSendFlush, OwnerPID: os.Getpid(),
		}
		if w.mode == nbdnl.ModeNetlink {
			want.Identifier, want.HasIdentifier = cfg.Identifier, true
		}
		if w.anonymous {
			want.Identifier, want.HasIdentifier, want.OwnerPID = "", false, 0
		}
		got := w.status(index)
		got.Flags &^= nbdnl.FlagRotational | nbdnl.FlagSendWriteZeroes // may be left from another test
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(nbdnl.Status{}, "OwnerTID")); diff != "" {
			w.Errorf("status of a connected device (-want +got):\n%s", diff)
		}
		if (got.OwnerTID == 0) != w.anonymous { // the driver of such a kernel must not be asked
			w.Errorf("owner thread is %d", got.OwnerTID)
		}
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-r.done
		w.wantState(index, nbdnl.StateIdle)
		want = nbdnl.Status{Index: index, State: nbdnl.StateIdle, BlockSize: 512}
		if diff := cmp.Diff(want, w.status(index)); diff != "" {
			w.Errorf("status of a disconnected device (-want +got):\n%s", diff)
		}
	}},
	{"a connected device is ready, and no other", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		partitions, err := w.WaitReady(w.Context(), index)
		w.wantDone("wait until ready", err)
		if len(partitions) != 0 {
			w.Errorf("partitions are %v", partitions)
		}
		w.wantDone("disconnect any", w.DisconnectAny(w.Context(), index))
		w.wantDone("wait until free", w.WaitFree(w.Context(), index))
		_, err = w.WaitReady(w.Context(), index)
		w.wantError(err, nbdnl.ErrNotConnected)
	}},
	{"status shows the flags that are in force", nbdnl.ModeNone, func(w world) {
		const required = nbdnl.FlagSendFlush | nbdnl.FlagSendFUA | nbdnl.FlagSendTrim
		const offered = nbdnl.FlagSendWriteZeroes | nbdnl.FlagRotational
		for _, flags := range []nbdnl.Flags{
			0, nbdnl.FlagSendFlush, nbdnl.FlagSendTrim, required, required | offered, required | nbdnl.FlagReadOnly, nbdnl.FlagReadOnly, 0,
		} {
			cfg := config(serve(w))
			cfg.Flags = flags
			index := w.connect(cfg)
			if got := w.status(index).Flags; got&^offered != flags&^offered {
				w.Errorf("flags in force are %#x, want %#x", got, flags)
			}
			w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
			w.wantState(index, nbdnl.StateIdle)
		}
		// FUA alone means nothing, and so is no reason to refuse.
		cfg := config(serve(w))
		cfg.Flags = nbdnl.FlagSendFUA
		if got := w.status(w.connect(cfg)).Flags &^ offered; got != 0 {
			w.Errorf("flags in force are %#x for FUA alone", got)
		}
	}},
	{"devices are listed by index", nbdnl.ModeNone, func(w world) {
		a, b := w.connect(config(serve(w))), w.connect(config(serve(w)))
		devices, err := w.Devices(w.Context())
		w.wantDone("devices", err)
		live, last := 0, -1
		for _, d := range devices {
			if d.Index <= last {
				w.Errorf("nbd%d comes after nbd%d", d.Index, last)
			}
			last = d.Index
			if d.State == nbdnl.StateLive && (d.Index == a || d.Index == b) {
				live++
			}
		}
		if live != 2 || len(devices) < 16 {
			w.Errorf("%d of the 2 connected devices among the %d", live, len(devices))
		}
	}},
	{"a taken index is busy, and leaves the sockets alone", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		r := serve(w)
		cfg := config(r)
		w.wantError(w.ConnectIndex(w.Context(), index, cfg), nbdnl.ErrBusy, os.ErrExist, syscall.EBUSY)
		other := w.connect(cfg)
		if other == index {
			w.Errorf("the kernel chose nbd%d, which is taken", index)
		}
		w.wantState(other, nbdnl.StateLive)
	}},
	{"an index beyond the module's devices is made", nbdnl.ModeNetlink, func(w world) {
		cfg := config(serve(w))
		w.wantDone("connect", w.ConnectIndex(w.Context(), 40, cfg))
		w.wantState(40, nbdnl.StateLive)
		w.wantDone("disconnect", w.Disconnect(w.Context(), 40, cfg.Identifier))
		w.wantState(40, nbdnl.StateIdle)
	}},
	{"another's device is left alone", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		timeout := time.Second
		w.wantError(w.Disconnect(w.Context(), index, "test:other"), nbdnl.ErrNotOwner)
		w.wantError(w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: "test:other", Force: true}), nbdnl.ErrNotOwner)
		w.wantError(w.Reconfigure(w.Context(), index, "test:other", nbdnl.Update{Timeout: &timeout}), nbdnl.ErrNotOwner)
		w.wantState(index, nbdnl.StateLive)
		w.wantDone("disconnect any", w.DisconnectAny(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"what is not connected can't be disconnected", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		w.wantDone("disconnect any", w.DisconnectAny(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
		w.wantError(w.Disconnect(w.Context(), index, ""), nbdnl.ErrNotConnected)
		w.wantError(w.DisconnectAny(w.Context(), index), nbdnl.ErrNotConnected)
		w.wantError(w.Detach(w.Context(), index, nbdnl.DetachOptions{Any: true}), nbdnl.ErrNotConnected)
		w.wantError(w.Detach(w.Context(), 3000, nbdnl.DetachOptions{Any: true}), os.ErrNotExist)
		w.wantError(w.DisconnectAny(w.Context(), 3000), os.ErrNotExist)
		_, err := w.Status(w.Context(), 3000)
		w.wantError(err, os.ErrNotExist)
		w.wantDone("wait for an idle device", w.WaitFree(w.Context(), index))
	}},
	{"an idle device that is open is held, and busy until it is closed", nbdnl.ModeNone, func(w world) {
		release := w.hold(5)
		w.wantState(5, nbdnl.StateHeld)
		ctx, cancel := context.WithTimeout(w.Context(), 50*time.Millisecond)
		defer cancel()
		w.wantError(w.ConnectIndex(ctx, 5, config(serve(w))), nbdnl.ErrBusy)
		time.AfterFunc(20*time.Millisecond, release)
		cfg := config(serve(w))
		w.wantDone("connect while it is being closed", w.ConnectIndex(w.Context(), 5, cfg))
		w.wantDone("disconnect", w.Disconnect(w.Context(), 5, cfg.Identifier))
	}},
	{"a disconnected device stays until its last opener closes", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		release := w.hold(index)
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateDisconnecting)
		w.wantError(w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{}), nbdnl.ErrNotConnected)
		ctx, cancel := context.WithTimeout(w.Context(), 50*time.Millisecond)
		defer cancel()
		w.wantError(w.WaitFree(ctx, index), context.DeadlineExceeded)
		time.AfterFunc(20*time.Millisecond, release)
		w.wantDone("wait", w.WaitFree(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"detach leaves nothing", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		cfg := config(r)
		index := w.connect(cfg)
		w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
		w.wantState(index, nbdnl.StateIdle)
		<-r.done
		cfg = config(serve(w))
		w.wantDone("connect again", w.ConnectIndex(w.Context(), index, cfg))
		w.wantDone("detach again", w.Detach(w.Context(), index, nbdnl.DetachOptions{Any: true}))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"detach refuses a device that is open, and says who", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		release := w.hold(index)
		err := w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
		var busy *nbdnl.BusyError
		if !errors.As(err, &busy) || busy.Disconnected || len(busy.Holders) != 1 {
			w.Fatalf("detach of an open device: %v", err)
		}
		w.wantError(err, nbdnl.ErrBusy)
		if h := busy.Holders[0]; h.Kind != nbdnl.HolderProcess || h.PID == 0 || h.Comm == "" || h.Device != nbdnl.Path(index)[len("/dev/"):] {
			w.Errorf("holder is %+v", h)
		}
		w.wantState(index, nbdnl.StateLive)
		release()
		w.wantDone("detach after release", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
	}},
	{"detach waits for a prober", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		time.AfterFunc(100*time.Millisecond, w.hold(index))
		w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"forced detach of an open device says that it is not free", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		cfg := config(r)
		index := w.connect(cfg)
		release := w.hold(index)
		err := w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: true})
		var busy *nbdnl.BusyError
		if !errors.As(err, &busy) || !busy.Disconnected || len(busy.Holders) != 1 {
			w.Fatalf("forced detach of an open device: %v", err)
		}
		<-r.done
		w.wantState(index, nbdnl.StateDisconnecting)
		release()
		w.wantDone("wait", w.WaitFree(w.Context(), index))
	}},
	{"the first of two detaches does it", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		errs := make(chan error, 2)
		for range 2 {
			go func() {
				errs <- w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
			}()
		}
		a, b := <-errs, <-errs
		if (a == nil) == (b == nil) {
			w.Fatalf("two detaches: %v and %v", a, b)
		}
		w.wantError(errors.Join(a, b), nbdnl.ErrNotConnected)
	}},
	{"reconfigure sets the size", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		size, timeout := int64(2*mebi), 9*time.Second
		w.wantDone("reconfigure", w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size, Timeout: &timeout}))
		if got := w.status(index).Size; got != size {
			w.Errorf("size is %d, want %d", got, size)
		}
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateIdle)
		w.wantError(w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}), nbdnl.ErrNotConnected)
	}},
	{"reconfigure sets the block size of a size that it fits", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		cfg.Size = 2048 + 512
		index := w.connect(cfg)
		block := 2048
		if err := w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{BlockSize: &block}); err == nil {
			w.Error("the device has got a tail that can't be read")
		}
		block = 1024
		size := int64(4 * block)
		w.wantDone("size and block size", w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size, BlockSize: &block}))
		block = 4096
		w.wantDone("block size", w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{BlockSize: &block}))
		if got := w.status(index); got.Size != size || got.BlockSize != block {
			w.Errorf("size is %d with blocks of %d", got.Size, got.BlockSize)
		}
	}},
	{"a socket takes the place of a dead connection", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.DeadConnTimeout = 30 * time.Second
		index := w.connect(cfg)
		old.ours.Close()
		w.wantDone("reconfigure", w.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)))
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"a socket is dropped when no connection is dead, and is as good as new", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		index := w.connect(cfg)
		ctx, cancel := context.WithTimeout(w.Context(), 100*time.Millisecond)
		defer cancel()
		err := w.Reconfigure(ctx, index, cfg.Identifier, sockets(r))
		w.wantError(err, context.DeadlineExceeded)
		w.wantDropped(err, 0)
		time.AfterFunc(50*time.Millisecond, func() { old.ours.Close() })
		w.wantDone("reconfigure", w.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)))
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"of several sockets those that find no dead connection are named", nbdnl.ModeNetlink, func(w world) {
		first, second := serve(w), serve(w)
		a, b, c := serve(w), serve(w), serve(w)
		cfg := config(first, second)
		cfg.Flags |= nbdnl.FlagCanMultiConn
		index := w.connect(cfg)
		first.ours.Close()
		second.ours.Close()
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		w.wantDropped(w.Reconfigure(ctx, index, cfg.Identifier, sockets(a, b, c)), 2)
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-a.done
		<-b.done
		select {
		case <-c.done:
			w.Error("the kernel has shut down a socket that it has not taken")
		default:
		}
	}},
	{"a device without a timeout takes sockets as well", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.Timeout = 0
		index := w.connect(cfg)
		ctx, cancel := context.WithTimeout(w.Context(), 50*time.Millisecond)
		defer cancel()
		w.wantDropped(w.Reconfigure(ctx, index, cfg.Identifier, sockets(r)), 0)
		old.ours.Close()
		w.wantDone("reconfigure", w.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)))
		w.wantNoSendLimit(r)
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-r.done
	}},
	{"another program can replace a connection if it knows the timeout", nbdnl.ModeNetlink, func(w world) {
		old, r := serve(w), serve(w)
		cfg := config(old)
		cfg.Timeout = 0
		index := w.connect(cfg)
		other := w.another()
		if w.anonymous {
			w.wantNotOwner(other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)))
			return
		}
		w.wantError(other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(r)), nbdnl.ErrNotVerified)
		old.ours.Close()
		update := sockets(r)
		timeout := 5 * time.Second
		update.Timeout = &timeout
		w.wantDone("reconfigure", other.Reconfigure(w.Context(), index, cfg.Identifier, update))
		next := serve(w)
		r.ours.Close()
		// That the device has a timeout, a third one does not know, but sees.
		w.wantDone("reconfigure again", w.untilVerified(w.another(), index, cfg.Identifier, sockets(next)))
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		<-next.done
	}},
	{"a watch sees what happens, whoever does it", nbdnl.ModeNetlink, func(w world) {
		other := w.another()
		before := config(serve(w))
		old := w.connect(before)
		watch := w.watch()
		if d := watch.Devices(); len(d) != 1 || d[0].Index != old || !carries(d[0], before) {
			w.Errorf("devices at the start: %+v", d)
		}

		r := serve(w)
		cfg := config(r)
		cfg.DeadConnTimeout = time.Minute
		index, err := other.Connect(w.Context(), cfg)
		w.wantDone("connect", err)
		live := watch.want(index, nbdnl.EventConnect)
		if s := live.Status; s.State != nbdnl.StateLive || s.Size != mebi || !carries(s, cfg) || live.Previous.State != nbdnl.StateIdle {
			w.Errorf("connect is %+v", live)
		}
		size := int64(2 * mebi)
		w.wantDone("resize", other.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}))
		if e := watch.want(index, nbdnl.EventResize); e.Status.Size != size || e.Previous.Size != mebi {
			w.Errorf("resize is %+v", e)
		}
		w.cut(index, r)
		if e := watch.want(index, nbdnl.EventLinkDead); !carries(e.Status, cfg) {
			w.Errorf("link-dead is %+v", e)
		}
		w.wantDone("reconfigure", other.Reconfigure(w.Context(), index, cfg.Identifier, sockets(serve(w))))
		w.wantDone("disconnect", other.Disconnect(w.Context(), index, cfg.Identifier))
		if e := watch.want(index, nbdnl.EventDisconnect); e.Status.State != nbdnl.StateIdle || !carries(e.Previous, cfg) {
			w.Errorf("disconnect is %+v", e)
		}
		w.wantDone("disconnect", w.Disconnect(w.Context(), old, before.Identifier))
		watch.want(old, nbdnl.EventDisconnect)
	}},
	{"a watch does not miss a use of an index between two looks", nbdnl.ModeNone, func(w world) {
		watch := w.watch()
		cfg := config(serve(w))
		index := w.connect(cfg)
		watch.want(index, nbdnl.EventConnect)
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateIdle)
		next := config(serve(w))
		w.wantDone("connect", w.ConnectIndex(w.Context(), index, next))
		if e := watch.want(index, nbdnl.EventDisconnect); !carries(e.Previous, cfg) || e.Status.Connected() {
			w.Errorf("disconnect is %+v", e)
		}
		if e := watch.want(index, nbdnl.EventConnect); !carries(e.Status, next) || e.Previous.Connected() {
			w.Errorf("connect is %+v", e)
		}
		w.wantDone("disconnect", w.Disconnect(w.Context(), index, next.Identifier))
	}},
	{"a watch ends with its context", nbdnl.ModeNone, func(w world) {
		ctx, cancel := context.WithCancelCause(w.Context())
		watch, err := w.Watch(ctx)
		if err != nil {
			w.Fatal(err)
		}
		defer watch.Close()
		cause := errors.New("enough")
		time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
		for err == nil {
			_, err = watch.Next()
		}
		w.wantError(err, cause)

		watch, err = w.Watch(w.Context())
		if err != nil {
			w.Fatal(err)
		}
		time.AfterFunc(20*time.Millisecond, watch.Close)
		for err == nil {
			_, err = watch.Next()
		}
		w.wantError(err, os.ErrClosed)
	}},
	{"read-only and several sockets", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w), serve(w))
		w.wantRefusal(cfg, "FlagCanMultiConn")
		cfg.Flags |= nbdnl.FlagReadOnly | nbdnl.FlagCanMultiConn
		index := w.connect(cfg)
		if !w.status(index).ReadOnly {
			w.Error("device is not read-only")
		}
		w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
	}},
	{"what is no stream socket is refused", nbdnl.ModeNone, func(w world) {
		f, err := os.Open("/dev/null")
		if err != nil {
			w.Fatal(err)
		}
		defer f.Close()
		cfg := config()
		cfg.Sockets = []syscall.Conn{f}
		_, err = w.Connect(w.Context(), cfg)
		w.wantError(err, syscall.ENOTSOCK)
	}},
	{"closed sockets are refused", nbdnl.ModeNone, func(w world) {
		r := serve(w)
		if err := r.kernel.(net.Conn).Close(); err != nil {
			w.Fatal(err)
		}
		_, err := w.Connect(w.Context(), config(r))
		w.wantError(err, net.ErrClosed)
	}},
	{"an ended context does nothing", nbdnl.ModeNone, func(w world) {
		ctx, cancel := context.WithCancelCause(w.Context())
		cause := errors.New("no time")
		cancel(cause)
		cfg := config(serve(w))
		_, err := w.Connect(ctx, cfg)
		w.wantError(err, cause)
		index := w.connect(cfg)
		w.wantError(w.Disconnect(ctx, index, cfg.Identifier), cause)
		w.wantError(w.Detach(ctx, index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: true}), cause)
		w.wantState(index, nbdnl.StateLive)
	}},
}

// carries reports whether the status is that of a device with the configuration's identifier, which not
// all kernels keep, and of no device that was connected by ioctls.
func carries(s nbdnl.Status, cfg nbdnl.Config) bool {
	return !s.HasIdentifier || s.Identifier == cfg.Identifier
}

// sockets is an update with the sockets of responders.
func sockets(responders ...*responder) nbdnl.Update {
	return nbdnl.Update{Sockets: config(responders...).Sockets}
}

// wantDropped checks that the sockets in these positions were dropped, and no others.
func (w world) wantDropped(err error, want ...int) {
	w.Helper()
	var dropped *nbdnl.DroppedError
	if !errors.As(err, &dropped) || !errors.Is(err, nbdnl.ErrNoDeadConnection) {
		w.Fatalf("error is %v, want one of dropped sockets", err)
	}
	if diff := cmp.Diff(want, dropped.Sockets); diff != "" {
		w.Errorf("dropped sockets (-want +got):\n%s", diff)
	}
}

// wantNoSendLimit checks that the kernel may send for as long as it takes.
func (w world) wantNoSendLimit(r *responder) {
	w.Helper()
	raw, err := r.kernel.SyscallConn()
	if err != nil {
		w.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		if tv, err := unix.GetsockoptTimeval(int(fd), unix.SOL_SOCKET, unix.SO_SNDTIMEO); err != nil || *tv != (unix.Timeval{}) {
			w.Errorf("limit of sends is %v, %v", tv, err)
		}
	})
}

// untilVerified repeats a reconfigure that comes before the kernel has noticed the death of the connection.
func (w world) untilVerified(c *nbdnl.Client, index int, identifier string, u nbdnl.Update) error {
	for patience := time.Now().Add(3 * time.Second); ; {
		err := c.Reconfigure(w.Context(), index, identifier, u)
		if !errors.Is(err, nbdnl.ErrNotVerified) || time.Now().After(patience) {
			return err
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (w world) wantRefusal(cfg nbdnl.Config, mention string) {
	w.Helper()
	_, err := w.Connect(w.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), mention) {
		w.Errorf("error is %v, want one that mentions %q", err, mention)
	}
}
