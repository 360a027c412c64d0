package nbdnl_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// kernelWorld is the real kernel for the tests that only it can answer.
func kernelWorld(t *testing.T) world {
	t.Helper()
	nbdnltest.RequireKernel(t)
	return world{T: t, Client: newClient(t, nbdnl.System{}), anonymous: !nbdnltest.Identifiers.In(t)}
}

// disk returns the configuration of a device of some MiB that keeps what is written to it, and who
// serves it.
func disk(t testing.TB, mebis int) (nbdnl.Config, *responder) {
	t.Helper()
	r := newResponder(t)
	r.data = make([]byte, mebis<<20)
	r.start(t)
	cfg := config(r)
	cfg.Size = int64(len(r.data))
	return cfg, r
}

// run runs a program, which must succeed.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// The example of this package does what it says.
func TestKernelExample(t *testing.T) {
	nbdnltest.RequireKernel(t)
	r := serve(t)
	if err := attach(t.Context(), r.kernel.(*net.UnixConn)); err != nil {
		t.Fatal(err)
	}
	<-r.done
}

// However a connect is cut short, it leaves no device.
func TestKernelConnectCutShort(t *testing.T) {
	w := kernelWorld(t)
	for i := range 20 {
		cfg := config(serve(t))
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*500*time.Microsecond)
		index, err := w.Connect(ctx, cfg)
		cancel()
		if err == nil {
			w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
			continue
		}
		w.wantError(err, context.DeadlineExceeded)
		devices, err := w.Devices(t.Context())
		w.wantDone("devices", err)
		for _, d := range devices {
			if d.Identifier == cfg.Identifier {
				t.Errorf("round %d left %+v", i, d)
			}
		}
	}
}

// Two that attach and detach all the time do not notice each other.
func TestKernelChurn(t *testing.T) {
	w := kernelWorld(t)
	done := make(chan struct{})
	for range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 10 {
				r := newResponder(t).start(t)
				cfg := config(r)
				index, err := w.Connect(t.Context(), cfg)
				if err != nil {
					t.Errorf("connect: %v", err)
					return
				}
				if err := w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}); err != nil {
					t.Errorf("detach: %v", err)
					return
				}
			}
		}()
	}
	<-done
	<-done
}

// Two that want the same index get it one after the other, if they claim it.
func TestKernelChurnOneIndex(t *testing.T) {
	w := kernelWorld(t)
	const index = 7
	done := make(chan struct{})
	for range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 10 {
				if err := takeTurn(t, w, index); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	<-done
	<-done
}

// takeTurn connects the index when nobody else has it, and detaches it.
func takeTurn(t *testing.T, w world, index int) error {
	cfg := config(newResponder(t).start(t))
	for {
		claimed, err := w.Claims().Claim(t.Context(), index)
		if err != nil {
			return err
		}
		connectErr := w.ConnectIndex(t.Context(), index, cfg)
		if err := claimed.Release(); err != nil {
			return err
		}
		if connectErr == nil {
			return w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
		}
		if !errors.Is(connectErr, nbdnl.ErrBusy) {
			return connectErr
		}
		if err := w.WaitFree(t.Context(), index); err != nil {
			return err
		}
	}
}

// asNobody is set in the environment of the test that runs itself without privilege.
const asNobody = "NBDNL_TEST_INDEX"

func TestKernelUnprivileged(t *testing.T) {
	if env := os.Getenv(asNobody); env != "" {
		testUnprivileged(t, env)
		return
	}
	w := kernelWorld(t)
	r := serve(t)
	cfg := config(r)
	cfg.DeadConnTimeout = time.Minute
	index := w.connect(cfg)
	defer w.keepChanging(index, cfg, r)()
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestKernelUnprivileged$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", asNobody, index, w.status(index).Identifier))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "PASS: TestKernelUnprivileged") {
		t.Errorf("as another user: %v\n%s", err, out)
	}
	w.wantState(index, nbdnl.StateLive)
}

// keepChanging resizes the device and replaces its connection, over and over, until stopped.
func (w world) keepChanging(index int, cfg nbdnl.Config, r *responder) (stop func()) {
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 1; ctx.Err() == nil; i++ {
			size := int64(1+i%2) * mebi
			w.wantDone("resize", w.Reconfigure(w.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}))
			next := serve(w)
			r.ours.Close()
			w.wantDone("reconnect", w.Reconfigure(w.Context(), index, cfg.Identifier, sockets(next)))
			r = next
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func testUnprivileged(t *testing.T, env string) {
	first, identifier, _ := strings.Cut(env, " ")
	index, err := nbdnl.ParseIndex(first)
	if err != nil {
		t.Fatal(err)
	}
	w := world{T: t, Client: newClient(t, nbdnl.System{}), anonymous: identifier == ""}
	parent := os.Getppid()
	if w.anonymous {
		parent = 0
	}
	if s := w.status(index); s.State != nbdnl.StateLive || s.Identifier != identifier || s.OwnerPID != parent {
		t.Errorf("status of a device of process %d, identifier %q: %+v", parent, identifier, s)
	}
	devices, err := w.Devices(t.Context())
	w.wantDone("devices", err)
	if len(devices) < 16 {
		t.Errorf("%d devices are listed", len(devices))
	}
	watch := w.watch()
	if d := watch.Devices(); len(d) != 1 || d[0].Index != index {
		t.Errorf("the watch begins with %+v", d)
	}
	for seen := make(map[nbdnl.EventKind]bool); !seen[nbdnl.EventResize] || !seen[nbdnl.EventLinkDead]; {
		e, err := watch.Next()
		if err != nil {
			t.Fatalf("only %v were seen: %v", seen, err)
		}
		seen[e.Kind] = true
	}
	_, err = holder.Find(t.Context(), index)
	w.wantDone("holders", err)
	_, err = w.Connect(t.Context(), config(serve(t)))
	w.wantError(err, os.ErrPermission)
	w.wantError(w.DropAny(t.Context(), index), os.ErrPermission)
	w.wantError(w.Detach(t.Context(), index, nbdnl.DetachOptions{Any: true}), os.ErrPermission)
	if w.anonymous {
		w.wantNotOwner(w.Drop(t.Context(), index, "test:another's"))
		return
	}
	w.wantError(w.Drop(t.Context(), index, identifier), os.ErrPermission)
	w.wantError(w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: identifier}), os.ErrPermission)
}
