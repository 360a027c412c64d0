package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// What only the fake kernel can be made to do.

// fakeWorld returns a fake kernel and a client of it.
func fakeWorld(t *testing.T, o nbdnltest.Options) (world, *nbdnltest.Kernel) {
	t.Helper()
	k := nbdnltest.New(t, o)
	return world{T: t, Client: k.Client()}, k
}

// unserved returns a configuration with a socket that nobody serves.
func unserved(t *testing.T) nbdnl.Config {
	t.Helper()
	cfg, _ := ending(t)
	return cfg
}

// ending is unserved together with what ends the connection.
func ending(t *testing.T) (cfg nbdnl.Config, end func()) {
	t.Helper()
	kernel, ours := socketpair(t)
	t.Cleanup(func() {
		kernel.Close()
		ours.Close()
	})
	cfg = config()
	cfg.Sockets = []syscall.Conn{kernel}
	return cfg, func() { ours.Close() }
}

func TestConnectTellsTheKernel(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	cfg.BlockSize = 0
	cfg.DeadConnTimeout = time.Minute
	cfg.ClientFlags = nbdnl.DisconnectOnClose
	index := w.connect(cfg)
	want := nbdnltest.Setting{
		Size: mebi, BlockSize: 1024, Timeout: 5, DeadConnTimeout: 60, Identifier: cfg.Identifier,
		ServerFlags: 1 | 4, ClientFlags: 2, Sockets: 1,
	}
	if diff := cmp.Diff(want, k.Setting(index)); diff != "" {
		t.Errorf("setting (-want +got):\n%s", diff)
	}
}

func TestConnectRefusals(t *testing.T) {
	tests := []struct {
		name   string
		errno  syscall.Errno
		change func(*nbdnl.Config)
		is     []error
		says   string
	}{
		{"no privilege", syscall.EPERM, nil, []error{os.ErrPermission}, "CAP_SYS_ADMIN in the initial user namespace"},
		{"bad for a reason that only the log has", syscall.EINVAL, nil, []error{syscall.EINVAL}, "kernel log"},
		{
			"block size", syscall.EINVAL, func(c *nbdnl.Config) { c.BlockSize = 65536 },
			[]error{errors.ErrUnsupported, syscall.EINVAL}, "block size 65536 is more than this kernel takes",
		},
		{"no minors left", syscall.ENOSPC, nil, []error{syscall.ENOSPC}, "connect"},
		{"unloading", syscall.ENODEV, nil, []error{os.ErrNotExist}, "connect"},
		{"busy", syscall.EBUSY, nil, []error{nbdnl.ErrBusy, os.ErrExist}, "connect"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w, k := fakeWorld(t, nbdnltest.Options{})
			cfg := unserved(t)
			if tt.change != nil {
				tt.change(&cfg)
			}
			k.Fail(nbdnltest.Connect, tt.errno)
			_, err := w.Connect(t.Context(), cfg)
			w.wantError(err, tt.is...)
			var detail *nbdnl.Error
			if !errors.As(err, &detail) || detail.Op != "connect" || detail.Index != -1 {
				t.Errorf("error is %#v", err)
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error is %v, want one that says %q", err, tt.says)
			}
			// The socket is as good as before for the next command.
			w.wantState(w.connect(unserved(t)), nbdnl.StateLive)
		})
	}
}

// An identifier finds the device again whose connect succeeded without a word.
func TestConnectAnswerLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		w.connect(unserved(t))
		k.Mute(nbdnltest.Connect)
		index := w.connect(unserved(t))
		if index != 1 {
			t.Errorf("found nbd%d, want nbd1", index)
		}
		w.wantState(index, nbdnl.StateLive)

		k.Mute(nbdnltest.Connect)
		cfg := unserved(t)
		cfg.Identifier = ""
		_, err := w.Connect(t.Context(), cfg)
		if err == nil || !strings.Contains(err.Error(), "answer got lost") {
			t.Errorf("without an identifier: %v", err)
		}
		// The connection is in step again.
		w.wantState(w.connect(unserved(t)), nbdnl.StateLive)
	})
}

func TestConnectCutShort(t *testing.T) {
	t.Run("undone on return", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, k := fakeWorld(t, nbdnltest.Options{})
			time.AfterFunc(2*time.Second, k.Block(nbdnltest.Connect))
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := w.Connect(ctx, unserved(t))
			w.wantError(err, context.DeadlineExceeded)
			if s := k.Setting(0); s != (nbdnltest.Setting{}) {
				t.Errorf("left behind: %+v", s)
			}
		})
	})
	t.Run("undone later", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, k := fakeWorld(t, nbdnltest.Options{})
			unblock := k.Block(nbdnltest.Connect)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			_, err := w.Connect(ctx, unserved(t))
			w.wantError(err, context.DeadlineExceeded)
			if d := time.Since(begin); d != 3*time.Second {
				t.Errorf("returned after %v, want 3s", d)
			}
			unblock()
			synctest.Wait()
			if s := k.Setting(0); s != (nbdnltest.Setting{}) {
				t.Errorf("left behind: %+v", s)
			}
			if n := k.Commands(nbdnltest.Disconnect); n != 1 {
				t.Errorf("%d disconnects, want 1", n)
			}
		})
	})
}

func TestStuckKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		unblock := k.Block(nbdnltest.Disconnect)
		within := func(d time.Duration, f func(ctx context.Context) error) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			begin := time.Now()
			w.wantError(f(ctx), context.DeadlineExceeded)
			if got := time.Since(begin); got != d {
				t.Errorf("returned after %v, want %v", got, d)
			}
		}
		within(time.Second, func(ctx context.Context) error { return w.Drop(ctx, index, cfg.Identifier) })
		// STATUS waits behind it; what sysfs alone can tell is told.
		w.wantState(index, nbdnl.StateLive)
		within(time.Second, func(ctx context.Context) error {
			devices, err := w.Devices(ctx)
			if len(devices) != 16 || devices[index].State != nbdnl.StateLive {
				t.Errorf("devices are %+v", devices)
			}
			return err
		})
		// However many commands are given, few wait in the kernel.
		for range 20 {
			within(time.Second, func(ctx context.Context) error {
				_, err := w.Status(ctx, 5)
				return err
			})
		}
		if n := k.Commands(nbdnltest.Status); n > 8 {
			t.Errorf("%d commands wait in the kernel", n)
		}
		unblock()
		synctest.Wait()
		w.wantState(index, nbdnl.StateIdle)
	})
}

func TestClosedClient(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	c, err := k.System().NewClient()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Connect(t.Context(), unserved(t)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("connect with a closed client: %v", err)
	}
}

// Linux 5.10 keeps no identifiers, and its `pid` file must not be read.
func TestOldKernel(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{Release: "5.10.0-30-amd64"})
	cfg := unserved(t)
	index := w.connect(cfg)
	if err := os.WriteFile(k.Path("sys/block/nbd0/pid"), []byte("was read"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := nbdnl.Status{
		Index:     index,
		State:     nbdnl.StateLive,
		Size:      mebi,
		BlockSize: 512,
		Mode:      nbdnl.ModeNetlink,
		Flags:     nbdnl.FlagSendFlush,
	}
	if diff := cmp.Diff(want, w.status(index)); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	other := k.Client()
	w.wantError(other.Drop(t.Context(), index, cfg.Identifier), errors.ErrUnsupported)
	w.wantState(index, nbdnl.StateLive)
	w.wantDone("detach any", other.Detach(t.Context(), index, nbdnl.DetachOptions{Any: true}))
	w.wantState(index, nbdnl.StateIdle)
}

// Without identifiers a client still knows the devices that it has connected, each until its end.
func TestOldKernelKnowsItsOwn(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{Release: "5.10.0-30-amd64"})
	cfg := unserved(t)
	index := w.connect(cfg)
	timeout := 7 * time.Second
	update := nbdnl.Update{Timeout: &timeout}
	w.wantError(w.Drop(t.Context(), index, "test:other"), nbdnl.ErrNotOwner)
	w.wantReconfigured(index, cfg.Identifier, update)
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	theirs := unserved(t)
	w.wantDone("connect by another", k.Client().ConnectIndex(t.Context(), index, theirs))
	w.wantError(w.Drop(t.Context(), index, cfg.Identifier), errors.ErrUnsupported)
	w.wantError(w.Reconfigure(t.Context(), index, cfg.Identifier, update), errors.ErrUnsupported)
	w.wantError(w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}), errors.ErrUnsupported)
	w.wantState(index, nbdnl.StateLive)
}

// What is required of a device must be in force, or there is none.
func TestConnectRequires(t *testing.T) {
	for _, tt := range []struct {
		ignored nbdnl.Flags
		setting string
	}{{nbdnl.FlagSendFlush | nbdnl.FlagSendFUA, "flush"}, {nbdnl.FlagSendFUA, "fua"}, {nbdnl.FlagSendTrim, "trim"}} {
		t.Run(tt.setting, func(t *testing.T) {
			w, k := fakeWorld(t, nbdnltest.Options{})
			k.Ignore(tt.ignored)
			cfg := unserved(t)
			cfg.Flags = nbdnl.FlagSendFlush | nbdnl.FlagSendFUA | nbdnl.FlagSendTrim
			_, err := w.Connect(t.Context(), cfg)
			w.wantError(err, errors.ErrUnsupported)
			var unsupported *nbdnl.UnsupportedError
			if !errors.As(err, &unsupported) {
				t.Fatalf("error is %v", err)
			}
			want := nbdnl.UnsupportedError{Setting: tt.setting, Want: "true", Got: "false"}
			if diff := cmp.Diff(want, *unsupported); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			w.wantState(0, nbdnl.StateIdle)
		})
	}
}

// An offer that the kernel does not make use of is none the worse.
func TestConnectOffers(t *testing.T) {
	w, _ := fakeWorld(t, nbdnltest.Options{Release: "6.1.0"})
	cfg := unserved(t)
	cfg.Flags |= nbdnl.FlagSendWriteZeroes | nbdnl.FlagRotational
	if got := w.status(w.connect(cfg)).Flags; got != nbdnl.FlagSendFlush {
		t.Errorf("flags in force are %#x", got)
	}
}

func TestIoctlDevice(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	k.ConnectIoctl(2, mebi)
	s := w.status(2)
	if s.State != nbdnl.StateLive || s.Mode != nbdnl.ModeIoctl || s.HasIdentifier {
		t.Errorf("status is %+v", s)
	}
	w.wantError(w.Drop(t.Context(), 2, ""), nbdnl.ErrNotOwner)
	w.wantDone("disconnect any", w.DropAny(t.Context(), 2))
	w.wantState(2, nbdnl.StateIdle)
}

func TestConnectingDevice(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	// nbd_start_device shows the owner before the size.
	if err := os.WriteFile(k.Path("sys/block/nbd4/pid"), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.wantState(4, nbdnl.StateConnecting)
}

// In another pid namespace the number of the owner means somebody else.
func TestOwnerInAnotherNamespace(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	link := k.Path("proc/self/ns/pid")
	if err := errors.Join(os.Remove(link), os.Symlink("pid:[4026532000]", link)); err != nil {
		t.Fatal(err)
	}
	if s := w.status(index); s.OwnerPID != 0 || s.OwnerTID != os.Getpid() || s.OwnerGone {
		t.Errorf("owner is thread %d, process %d, gone %v", s.OwnerTID, s.OwnerPID, s.OwnerGone)
	}
}

func TestOwnerGone(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	if s := w.status(index); s.OwnerGone {
		t.Error("the owner is gone while it lives")
	}
	if err := os.RemoveAll(k.Path("proc/" + strconv.Itoa(os.Getpid()))); err != nil {
		t.Fatal(err)
	}
	if s := w.status(index); !s.OwnerGone || s.OwnerPID != 0 {
		t.Errorf("owner is process %d, gone %v, though it ended", s.OwnerPID, s.OwnerGone)
	}
}
