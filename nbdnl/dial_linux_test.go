package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestNewWithoutDriver(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{NoModule: true})
	_, err := k.System().NewClient()
	var detail *nbdnl.Error
	if !errors.Is(err, nbdnl.ErrNoDriver) || !errors.As(err, &detail) || !strings.Contains(err.Error(), "not loaded") {
		t.Errorf("without the module: %v", err)
	}
	if n := k.Sockets(); n != 0 {
		t.Errorf("%d sockets are left open", n)
	}
}

// The driver is there, but Linux 6.1 hides its family outside the initial network namespace. What
// sysfs shows can be had all the same.
func TestDriverHidden(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{NoModule: true})
	k.ConnectIoctl(0, mebi)
	k.Hold(1)
	system := k.System()
	system.Mode = nbdnl.ModeNetlink
	w := world{T: t, Client: newClient(t, system)}
	w.wantState(0, nbdnl.StateLive)
	devices, err := w.Devices(t.Context())
	if len(devices) != 2 || devices[0].State != nbdnl.StateLive {
		t.Errorf("devices are %+v", devices)
	}
	hidden := map[string]error{"Devices": err, "Probe": w.Probe(t.Context())}
	_, hidden["Status"] = w.Status(t.Context(), 1)
	_, hidden["Connect"] = w.Connect(t.Context(), unserved(t))
	hidden["DropAny"] = w.DropAny(t.Context(), 0)
	_, hidden["Watch"] = w.Watch(t.Context())
	for command, err := range hidden {
		if !errors.Is(err, nbdnl.ErrNoDriver) || !strings.Contains(err.Error(), "network namespace") {
			t.Errorf("%s: %v", command, err)
		}
	}
}

// Whoever has not asked for netlink gets ioctls where the family is hidden.
func TestDriverHiddenFallback(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{HideFamily: true})
	w := world{T: t, Client: k.Client()}
	k.Hold(0)
	w.wantDone("probe", w.Probe(t.Context()))
	w.wantState(0, nbdnl.StateHeld)
	cfg := config(serve(t))
	index := w.connect(cfg)
	if s := w.status(index); index != 1 || s.Mode != nbdnl.ModeIoctl || s.State != nbdnl.StateLive {
		t.Errorf("connected nbd%d: %+v", index, s)
	}
	if n := k.Commands(nbdnltest.Connect); n != 0 {
		t.Errorf("%d netlink connects", n)
	}
	w.wantDone("detach", w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
	w.wantState(index, nbdnl.StateIdle)
}

// stuckWorld returns a kernel in which somebody else's disconnect of nbd1 is stuck, until unblock
// is called, while nbd0 is connected, and a client that is new.
func stuckWorld(t *testing.T, devices int) (w world, k *nbdnltest.Kernel, unblock func()) {
	t.Helper()
	other, k := fakeWorld(t, nbdnltest.Options{Devices: devices})
	for index := range 2 {
		other.wantDone("connect", other.ConnectIndex(t.Context(), index, unserved(t)))
	}
	unblock = k.Block(nbdnltest.Disconnect)
	go func() { _ = other.DropAny(context.WithoutCancel(t.Context()), 1) }()
	synctest.Wait()
	return world{T: t, Client: k.Client()}, k, unblock
}

func TestSysfsBesideStuckKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		w, k, unblock := stuckWorld(t, 2)
		sockets := k.Sockets()
		w.wantState(0, nbdnl.StateLive)
		devices, err := w.Devices(t.Context())
		w.wantDone("devices", err)
		if len(devices) != 2 {
			t.Errorf("%d devices", len(devices))
		}
		connected, err := w.Connected()
		w.wantDone("connected", err)
		if len(connected) != 2 || connected[0].Index != 0 {
			t.Errorf("connected are %+v", connected)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("took %v", d)
		}
		// Nobody is in the kernel whom the process would have to wait for.
		if n := k.Sockets(); n != sockets {
			t.Errorf("%d sockets were opened", n-sockets)
		}
		unblock()
		synctest.Wait()
	})
}

func TestDialStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k, unblock := stuckWorld(t, 16)
		sockets := k.Sockets()
		lasts := func(d time.Duration, f func() error) error {
			t.Helper()
			begin := time.Now()
			err := f()
			if got := time.Since(begin); got != d {
				t.Errorf("returned after %v, want %v", got, d)
			}
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w.wantError(lasts(time.Second, func() error { return w.Probe(ctx) }), context.DeadlineExceeded)
		// Without a deadline of the caller's; the fourteen devices that seem idle are waited for
		// once.
		err := lasts(10*time.Second, func() error {
			devices, err := w.Devices(t.Context())
			if len(devices) != 16 || devices[0].State != nbdnl.StateLive {
				t.Errorf("devices are %+v", devices)
			}
			return err
		})
		if err == nil || !strings.Contains(err.Error(), "stuck in the kernel") {
			t.Errorf("error is %v", err)
		}
		// A connect that has not come as far as the command has nothing to undo, and no grace.
		_, err = w.Connect(ctx, unserved(t))
		w.wantError(err, context.DeadlineExceeded)
		for range 20 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			w.wantError(w.Probe(ctx), context.DeadlineExceeded)
			cancel()
		}
		if n := k.Sockets() - sockets; n > 8 {
			t.Errorf("%d searches wait in the kernel", n)
		}
		unblock()
		synctest.Wait()
		w.wantDone("probe", w.Probe(t.Context()))
		w.wantState(w.connect(unserved(t)), nbdnl.StateLive)
	})
}

func TestDialTriedAgain(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	dial, failure := system.Dial, errors.New("no sockets left")
	failing := true
	system.Dial = func() (nbdnl.Socket, error) {
		if failing {
			return nil, failure
		}
		return dial()
	}
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Status(t.Context(), 0); !errors.Is(err, failure) {
		t.Errorf("status: %v", err)
	}
	failing = false
	if s, err := c.Status(t.Context(), 0); err != nil || s.State != nbdnl.StateIdle {
		t.Errorf("status is %+v, %v", s, err)
	}
}

func TestCloseBesideDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k, unblock := stuckWorld(t, 16)
		sockets := k.Sockets()
		never, err := k.System().NewClient()
		w.wantDone("new", err)
		w.wantDone("close before any dial", never.Close())
		w.wantError(never.Probe(t.Context()), os.ErrClosed)

		dialing, err := k.System().NewClient()
		w.wantDone("new", err)
		failed := make(chan error, 1)
		go func() { failed <- dialing.Probe(t.Context()) }()
		synctest.Wait()
		if n := k.Sockets() - sockets; n != 1 {
			t.Errorf("%d sockets, want that of the search", n)
		}
		w.wantDone("close while dialing", dialing.Close())
		unblock()
		synctest.Wait()
		<-failed // it has found the driver or not
		if n := k.Sockets() - sockets; n != 0 {
			t.Errorf("%d sockets are left open", n)
		}
		w.wantError(dialing.DropAny(t.Context(), 0), os.ErrClosed)
	})
}

// Commands that begin at once search at once, and leave nothing behind.
func TestDialConcurrently(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	c, err := k.System().NewClient()
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error)
	for index := range 16 {
		go func() {
			_, err := c.Status(t.Context(), index)
			errs <- err
		}()
	}
	for range 16 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if n := k.Sockets(); n != 0 {
		t.Errorf("%d sockets are left open", n)
	}
}
