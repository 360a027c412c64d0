package nbdnl_test

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestScenarios(t *testing.T) {
	runScenarios(t, func(t *testing.T, mode nbdnl.Mode) world {
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
			for _, s := range slices.Concat(connectScenarios, detachScenarios, reconfigureScenarios, watchScenarios) {
				if s.needs == nbdnl.ModeNone || s.needs == mode {
					t.Run(s.name, func(t *testing.T) { s.run(make(t, mode)) })
				}
			}
		})
	}
}

// A scenario is something to do in a world.
type scenario struct {
	name  string
	needs nbdnl.Mode // the only interface that can do it; ModeNone: both can
	run   func(w world)
}

// connectScenarios are those of devices that come and go.
var connectScenarios = []scenario{
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
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
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
		w.wantDone("disconnect any", w.DropAny(w.Context(), index))
		w.wantDone("wait until free", w.WaitFree(w.Context(), index))
		_, err = w.WaitReady(w.Context(), index)
		w.wantError(err, nbdnl.ErrNotConnected)
	}},
	{"status shows the flags that are in force", nbdnl.ModeNone, func(w world) {
		const required = nbdnl.FlagSendFlush | nbdnl.FlagSendFUA | nbdnl.FlagSendTrim
		const offered = nbdnl.FlagSendWriteZeroes | nbdnl.FlagRotational
		for _, flags := range []nbdnl.Flags{
			0,
			nbdnl.FlagSendFlush,
			nbdnl.FlagSendTrim,
			required,
			required | offered,
			required | nbdnl.FlagReadOnly,
			nbdnl.FlagReadOnly,
			0,
		} {
			cfg := config(serve(w))
			cfg.Flags = flags
			index := w.connect(cfg)
			if got := w.status(index).Flags; got&^offered != flags&^offered {
				w.Errorf("flags in force are %#x, want %#x", got, flags)
			}
			w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
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
		w.wantDone("disconnect", w.Drop(w.Context(), 40, cfg.Identifier))
		w.wantState(40, nbdnl.StateIdle)
	}},
	{"another's device is left alone", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		timeout := time.Second
		w.wantError(w.Drop(w.Context(), index, "test:other"), nbdnl.ErrNotOwner)
		forced := nbdnl.DetachOptions{Identifier: "test:other", Force: true}
		w.wantError(w.Detach(w.Context(), index, forced), nbdnl.ErrNotOwner)
		update := nbdnl.Update{Timeout: &timeout}
		w.wantError(w.Reconfigure(w.Context(), index, "test:other", update), nbdnl.ErrNotOwner)
		w.wantState(index, nbdnl.StateLive)
		w.wantDone("disconnect any", w.DropAny(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
	}},
	{"what is not connected can't be disconnected", nbdnl.ModeNone, func(w world) {
		index := w.connect(config(serve(w)))
		w.wantDone("disconnect any", w.DropAny(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
		w.wantError(w.Drop(w.Context(), index, ""), nbdnl.ErrNotConnected)
		w.wantError(w.DropAny(w.Context(), index), nbdnl.ErrNotConnected)
		w.wantError(w.Detach(w.Context(), index, nbdnl.DetachOptions{Any: true}), nbdnl.ErrNotConnected)
		w.wantError(w.Detach(w.Context(), 3000, nbdnl.DetachOptions{Any: true}), os.ErrNotExist)
		w.wantError(w.DropAny(w.Context(), 3000), os.ErrNotExist)
		_, err := w.Status(w.Context(), 3000)
		w.wantError(err, os.ErrNotExist)
		w.wantDone("wait for an idle device", w.WaitFree(w.Context(), index))
	}},
	{"an idle device that is open is held, and busy until it is closed", nbdnl.ModeNone, func(w world) {
		release := w.hold(5)
		w.wantState(5, nbdnl.StateHeld)
		w.wantError(w.impatiently(nbdnl.ErrBusy, func(ctx context.Context) error {
			return w.ConnectIndex(ctx, 5, config(serve(w)))
		}), nbdnl.ErrBusy)
		time.AfterFunc(20*time.Millisecond, release)
		cfg := config(serve(w))
		w.wantDone("connect while it is being closed", w.ConnectIndex(w.Context(), 5, cfg))
		w.wantDone("disconnect", w.Drop(w.Context(), 5, cfg.Identifier))
	}},
	{"a disconnected device stays until its last opener closes", nbdnl.ModeNone, func(w world) {
		cfg := config(serve(w))
		index := w.connect(cfg)
		release := w.hold(index)
		w.wantDone("disconnect", w.Drop(w.Context(), index, cfg.Identifier))
		w.wantState(index, nbdnl.StateDisconnecting)
		w.wantError(w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{}), nbdnl.ErrNotConnected)
		ctx, cancel := context.WithTimeout(w.Context(), 50*time.Millisecond)
		defer cancel()
		w.wantError(w.WaitFree(ctx, index), context.DeadlineExceeded)
		time.AfterFunc(20*time.Millisecond, release)
		w.wantDone("wait", w.WaitFree(w.Context(), index))
		w.wantState(index, nbdnl.StateIdle)
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
		w.wantError(w.Drop(ctx, index, cfg.Identifier), cause)
		w.wantError(w.Detach(ctx, index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: true}), cause)
		w.wantState(index, nbdnl.StateLive)
	}},
}
