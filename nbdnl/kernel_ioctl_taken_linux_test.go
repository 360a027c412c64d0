package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// These tests meet devices that others have taken.

// When all devices are in use the error says so, and no index is made.
func TestKernelIoctlNoFreeDevice(t *testing.T) {
	w := ioctlWorld(t)
	devices, err := w.Devices(t.Context())
	w.wantDone("devices", err)
	for _, d := range devices {
		defer w.open(d.Index, os.O_RDONLY).Close()
	}
	_, err = w.Connect(t.Context(), config(serve(t)))
	w.wantError(err, nbdnl.ErrBusy)
	w.wantError(w.ConnectIndex(t.Context(), len(devices)+20, config(serve(t))), os.ErrNotExist)
}

// A device that another program has connected by ioctls is left alone, and can be taken down by
// force.
func TestKernelIoctlStranger(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, make([]byte, mebi), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []nbdnl.Mode{nbdnl.ModeNetlink, nbdnl.ModeIoctl} {
		t.Run(mode.String(), func(t *testing.T) {
			nbdnltest.RequireKernel(t)
			w := world{T: t, Client: newClient(t, nbdnl.System{Mode: mode}), mode: mode}
			const index = 9
			// Verbose, it does not fork.
			server := exec.Command("qemu-nbd", "--verbose", "--format=raw", "--connect="+nbdnl.Path(index), image)
			if err := server.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- server.Wait() }()
			t.Cleanup(func() { // it has ended, and the device is free, unless the test fails
				_ = server.Process.Kill()
				ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), soon)
				defer cancel()
				w.wantDone("the end of qemu-nbd's device", w.WaitFree(ctx, index))
			})
			for patience := time.Now().Add(soon); !w.isLive(index) && time.Now().Before(patience); {
				<-time.After(10 * time.Millisecond)
			}
			w.wantState(index, nbdnl.StateLive)

			w.wantError(w.ConnectIndex(t.Context(), index, config(serve(t))), nbdnl.ErrBusy)
			err := w.Drop(t.Context(), index, "qemu")
			if !errors.Is(err, nbdnl.ErrNotOwner) && !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("disconnect: %v", err)
			}
			own := w.connect(config(serve(t)))
			if own == index {
				t.Errorf("nbd%d was given, which is qemu-nbd's", index)
			}
			// Whoever opens it besides its server holds it. Of the server itself the kernel tells
			// from Linux 6.1 on.
			holder := w.open(index, os.O_RDONLY)
			o := nbdnl.DetachOptions{Any: true, Server: server.Process.Pid}
			err = w.Detach(t.Context(), index, o)
			var busy *nbdnl.BusyError
			if !errors.As(err, &busy) || len(busy.Holders) != 1 || busy.Holders[0].PID != os.Getpid() {
				t.Errorf("detach of a device that is open: %v", err)
			}
			w.wantState(index, nbdnl.StateLive)
			holder.Close()
			w.wantDone("detach", w.Detach(t.Context(), index, o))
			w.wantState(index, nbdnl.StateIdle)
			w.wantState(own, nbdnl.StateLive)
			w.wantDone("qemu-nbd", w.within("qemu-nbd", soon, ended))
		})
	}
}

// Ioctls disconnect what netlink has connected, and can't change it.
func TestKernelIoctlOnNetlinkDevice(t *testing.T) {
	w := ioctlWorld(t)
	other := world{T: t, Client: newClient(t, nbdnl.System{Mode: nbdnl.ModeNetlink})}
	r := serve(t)
	cfg := config(r)
	index := other.connect(cfg)
	w.wantError(w.ConnectIndex(t.Context(), index, config(serve(t))), nbdnl.ErrBusy)
	size := int64(2 * mebi)
	w.wantError(w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}), errors.ErrUnsupported)
	w.wantState(index, nbdnl.StateLive)
	w.wantDone("detach", w.Detach(t.Context(), index, nbdnl.DetachOptions{Any: true}))
	<-r.done
	w.wantState(index, nbdnl.StateIdle)
	cfg = config(serve(t))
	w.wantDone("connect again", other.ConnectIndex(t.Context(), index, cfg))
	other.wantDetached(index, cfg.Identifier)
}
