package nbdnl_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
		{"block size", syscall.EINVAL, func(c *nbdnl.Config) { c.BlockSize = 65536 }, []error{errors.ErrUnsupported, syscall.EINVAL}, "block size 65536 is more than this kernel takes"},
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
		within(time.Second, func(ctx context.Context) error { return w.Disconnect(ctx, index, cfg.Identifier) })
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

func TestDetachUnwritable(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.FailSync(index, syscall.EIO)
	o := nbdnl.DetachOptions{Identifier: cfg.Identifier}
	err := w.Detach(t.Context(), index, o)
	w.wantError(err, syscall.EIO)
	w.wantState(index, nbdnl.StateLive)
	if n := k.Syncs(index); n != 1 {
		t.Errorf("synced %d times", n)
	}
	o.Force = true
	w.wantError(w.Detach(t.Context(), index, o), syscall.EIO)
	w.wantState(index, nbdnl.StateIdle)
}

// A dead server's device is given up with what is cached for it, but not under its users.
func TestDetachDead(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.FailSync(index, syscall.EIO)
	o := nbdnl.DetachOptions{Identifier: cfg.Identifier, Dead: true}

	unmount := k.Mount(index, "/mnt")
	var busy *nbdnl.BusyError
	if err := w.Detach(t.Context(), index, o); !errors.As(err, &busy) || busy.Disconnected {
		t.Errorf("mounted: %v", err)
	}
	unmount()
	f, err := k.System().Open(nbdnl.Path(index), os.O_RDONLY|syscall.O_EXCL)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Detach(t.Context(), index, o); !errors.As(err, &busy) || busy.Disconnected {
		t.Errorf("held exclusively: %v", err)
	}
	f.Close()
	w.wantState(index, nbdnl.StateLive)
	w.wantDone("detach", w.Detach(t.Context(), index, o))
	w.wantState(index, nbdnl.StateIdle)
}

func TestDetachDeadHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		k.Hang(index)
		w.wantDone("detach", w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Dead: true}))
		w.wantState(index, nbdnl.StateIdle)
	})
}

// A state directory that takes no claim makes no device immortal.
func TestDetachWithoutClaim(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	if err := os.RemoveAll(k.Path("run/nbdctl")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(k.Path("run"), 0o755), os.WriteFile(k.Path("run/nbdctl"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	o := nbdnl.DetachOptions{Identifier: cfg.Identifier}
	w.wantError(w.Detach(t.Context(), index, o), syscall.ENOTDIR)
	w.wantState(index, nbdnl.StateLive)
	o.Force = true
	w.wantDone("forced detach", w.Detach(t.Context(), index, o))
	w.wantState(index, nbdnl.StateIdle)
}

func TestDetachHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		k.Hang(index)
		o := nbdnl.DetachOptions{Identifier: cfg.Identifier}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		w.wantError(w.Detach(ctx, index, o), context.DeadlineExceeded)
		w.wantState(index, nbdnl.StateLive)

		o.Force = true
		begin := time.Now()
		err := w.Detach(t.Context(), index, o)
		if err == nil || !strings.Contains(err.Error(), "could not be written") {
			t.Errorf("forced: %v", err)
		}
		if d := time.Since(begin); d > 10*time.Second {
			t.Errorf("forced detach took %v", d)
		}
		w.wantState(index, nbdnl.StateIdle)
	})
}

func TestDetachMounted(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	unmount := k.Mount(index, "/mnt/a b")
	h := w.wantBusy(index, cfg.Identifier, nbdnl.HolderMount, "/mnt/a b")
	if got, want := h.String(), "mount of nbd0 at /mnt/a b"; got != want {
		t.Errorf("holder is %q, want %q", got, want)
	}
	unmount()
	w.wantDetached(index, cfg.Identifier)
}

// An exclusive opener of whom nothing shows is still a reason to leave the device alone.
func TestDetachHeldByUnknown(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	f, err := k.System().Open(nbdnl.Path(index), os.O_RDONLY|syscall.O_EXCL)
	if err != nil {
		t.Fatal(err)
	}
	w.wantBusy(index, cfg.Identifier, nbdnl.HolderExclusive, "")
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}

// A meddler is an open device that does something when it is synced.
type meddler struct {
	nbdnl.Device
	sync func() error
}

func (m meddler) Sync() error { return m.sync() }

// meddle returns a client whose devices do something when they are synced.
func meddle(t *testing.T, k *nbdnltest.Kernel, sync func() error) *nbdnl.Client {
	t.Helper()
	system := k.System()
	open := system.Open
	system.Open = func(path string, flag int) (nbdnl.Device, error) {
		d, err := open(path, flag)
		return meddler{d, sync}, err
	}
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// The index may be another's by the time that the data is written.
func TestDetachIndexUsedAnew(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	ours, theirs := unserved(t), unserved(t)
	index := w.connect(ours)
	// The kernel does not let go of an open device, so sysfs is made to show the other's at once.
	swap := func(identifier string) error {
		return os.WriteFile(k.Path("sys/block/nbd0/backend"), []byte(identifier+"\n"), 0o644)
	}
	for _, o := range []nbdnl.DetachOptions{{Identifier: ours.Identifier}, {Any: true}, {Any: true, Force: true}} {
		if err := swap(ours.Identifier); err != nil {
			t.Fatal(err)
		}
		c := meddle(t, k, func() error { return swap(theirs.Identifier) })
		w.wantError(c.Detach(t.Context(), index, o), nbdnl.ErrNotOwner)
		w.wantState(index, nbdnl.StateLive)
	}
	if n := k.Commands(nbdnltest.Disconnect); n != 0 {
		t.Errorf("%d disconnects", n)
	}
}

// Lives without an identifier are told apart, too.
func TestDetachIoctlIndexUsedAnew(t *testing.T) {
	_, k := fakeWorld(t, nbdnltest.Options{})
	k.ConnectIoctl(0, mebi)
	c := meddle(t, k, func() error { k.Replace(0); return nil })
	w := world{T: t, Client: c}
	w.wantError(c.Detach(t.Context(), 0, nbdnl.DetachOptions{Any: true}), nbdnl.ErrNotOwner)
	w.wantState(0, nbdnl.StateLive)
	if n := k.Commands(nbdnltest.Disconnect); n != 0 {
		t.Errorf("%d disconnects", n)
	}
}

// Somebody may open the device while its data is being written.
func TestDetachOpenedMeanwhile(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	c := meddle(t, k, func() error { k.Hold(index); return nil })
	err := c.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
	w.wantError(err, nbdnl.ErrBusy)
	w.wantState(index, nbdnl.StateLive)
}

func TestDetachDropsPartitions(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.Partition(index, 1)
	w.wantDetached(index, cfg.Identifier)
	if _, err := os.Stat(k.Path("sys/block/nbd0/nbd0p1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the partition is still there: %v", err)
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
		Index: index, State: nbdnl.StateLive, Size: mebi, BlockSize: 512, Mode: nbdnl.ModeNetlink, Flags: nbdnl.FlagSendFlush,
	}
	if diff := cmp.Diff(want, w.status(index)); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	other := k.Client()
	w.wantError(other.Disconnect(t.Context(), index, cfg.Identifier), errors.ErrUnsupported)
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
	w.wantError(w.Disconnect(t.Context(), index, "test:other"), nbdnl.ErrNotOwner)
	w.wantDone("reconfigure", w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Timeout: &timeout}))
	w.wantDone("disconnect", w.Disconnect(t.Context(), index, cfg.Identifier))
	theirs := unserved(t)
	w.wantDone("connect by another", k.Client().ConnectIndex(t.Context(), index, theirs))
	w.wantError(w.Disconnect(t.Context(), index, cfg.Identifier), errors.ErrUnsupported)
	w.wantError(w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Timeout: &timeout}), errors.ErrUnsupported)
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
	w.wantError(w.Disconnect(t.Context(), 2, ""), nbdnl.ErrNotOwner)
	w.wantDone("disconnect any", w.DisconnectAny(t.Context(), 2))
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

// The end of one use of the index is what is waited for, not an idle index.
func TestWaitFreeReconnected(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	uevents, looking := system.Uevents, make(chan struct{})
	system.Uevents = func() (io.ReadCloser, error) {
		close(looking) // at this use: it has been seen before
		return uevents()
	}
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := world{T: t, Client: c}
	index := w.connect(unserved(t))
	done := make(chan error)
	go func() { done <- w.WaitFree(t.Context(), index) }()
	<-looking
	w.wantDone("disconnect", w.DisconnectAny(t.Context(), index))
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, unserved(t)))
	w.wantDone("wait", <-done)
}

// Where uevents can't be had, looking now and then has to do.
func TestWaitFreeWithoutUevents(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	system.Uevents = func() (io.ReadCloser, error) { return nil, os.ErrPermission }
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := world{T: t, Client: c}
	index := w.connect(unserved(t))
	_, release := k.Hold(index)
	w.wantDone("disconnect", w.DisconnectAny(t.Context(), index))
	time.AfterFunc(20*time.Millisecond, release)
	w.wantDone("wait", w.WaitFree(t.Context(), index))
}

func TestHolders(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	write := func(path, content string) {
		t.Helper()
		path = k.Path(path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	holders := func() []string {
		t.Helper()
		found, err := k.System().Holders(3)
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, h := range found {
			s = append(s, h.String())
		}
		return s
	}
	if got := holders(); len(got) != 0 {
		t.Fatalf("holders of an unused device: %v", got)
	}
	k.Partition(3, 2)
	write("sys/block/nbd3/nbd3p2/holders/dm-0", "")
	write("sys/block/dm-0/dm/name", "vg-lv\n")
	write("sys/block/nbd3/holders/md5", "")
	write("sys/block/loop7/loop/backing_file", "/dev/nbd3\n")
	write("sys/block/loop8/loop/backing_file", "/srv/nbd3\n")
	write("proc/swaps", "Filename Type Size Used Priority\n/dev/nbd3p2                    partition\t4\t0\t-2\n/swap\\040file file 1 0 -3\n")
	k.Mount(3, "/mnt/own")
	// Another mount namespace, which shares one mount and has one of its own, of a file system that
	// shows a device number of its own.
	write("proc/900/comm", "systemd-nspawn\n")
	write("proc/900/mountinfo", "1 1 43:96 / /mnt/own rw - ext4 /dev/nbd3 rw\n"+
		"2 1 0:77 / /srv rw - btrfs /dev/nbd3p2 rw\n3 1 0:78 / /x rw - tmpfs /dev/nbd4 rw\n")
	if err := errors.Join(os.Mkdir(k.Path("proc/900/ns"), 0o755), os.Symlink("mnt:[2]", k.Path("proc/900/ns/mnt"))); err != nil {
		t.Fatal(err)
	}
	k.Hold(3)
	k.Hold(4)
	want := []string{
		"device md5 on nbd3",
		"device vg-lv on nbd3p2",
		"device loop7 on nbd3",
		"mount of nbd3 at /mnt/own",
		"mount of nbd3p2 at /srv (seen by process 900, systemd-nspawn)",
		"swap on nbd3p2",
		"process 4001 (holder) with nbd3 open",
	}
	if diff := cmp.Diff(want, holders()); diff != "" {
		t.Errorf("holders (-want +got):\n%s", diff)
	}
	if _, err := k.System().Holders(99); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("holders of no device: %v", err)
	}
	busy := &nbdnl.BusyError{Index: 3, Holders: make([]nbdnl.Holder, 6)}
	if got := busy.Error(); !strings.HasSuffix(got, " and 2 more") {
		t.Errorf("message is %q", got)
	}
}

// The descriptor that keeps a device connected by ioctls is no holder for the client whose it is, also where the
// kernel does not tell who that is; any other descriptor of the same process is one.
func TestHoldersOwn(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Release: "5.10.0"})
	system := k.System()
	system.Mode = nbdnl.ModeIoctl
	w := world{T: t, Client: newClient(t, system)}
	index := w.connect(unserved(t))
	dir := k.Path(filepath.Join("proc", strconv.Itoa(os.Getpid())))
	open := func(fd string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "fd"), 0o755), os.MkdirAll(filepath.Join(dir, "fdinfo"), 0o755),
			os.WriteFile(filepath.Join(dir, "fdinfo", fd), []byte("flags:\t0100000\n"), 0o644),
			os.Symlink(k.Path(nbdnl.Path(index)), filepath.Join(dir, "fd", fd))); err != nil {
			t.Fatal(err)
		}
	}
	count := func(name string, holders func(int) ([]nbdnl.Holder, error), want int) {
		t.Helper()
		found, err := holders(index)
		if err != nil || len(found) != want {
			t.Errorf("%s finds %v, %v, want %d", name, found, err, want)
		}
	}
	open("5")
	count("the client", w.Holders, 0)
	count("another client", newClient(t, system).Holders, 1)
	count("the system", system.Holders, 1)
	open("6")
	count("the client, with the device open once more", w.Holders, 1)
}

func TestClaim(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	t.Setenv("NBDCTL_STATE_DIR", "")
	s := k.System()
	first, err := s.Claim(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	path := k.Path("run/nbdctl/claims/nbd3")
	if _, err := os.Stat(path); err != nil {
		t.Errorf("no file of the claim: %v", err)
	}
	other, err := s.Claim(t.Context(), 4)
	if err != nil {
		t.Fatalf("claim of another index: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Claim(ctx, 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second claim: %v", err)
	}
	const waiting = 8
	claimed := make(chan *nbdnl.Claimed, waiting)
	for range waiting {
		go func() {
			c, err := s.Claim(t.Context(), 3)
			if err != nil {
				t.Error(err)
			}
			claimed <- c
		}()
	}
	for c, n := first, 0; ; c, n = <-claimed, n+1 {
		select {
		case <-claimed:
			t.Fatal("two have claimed the index at a time")
		case <-time.After(5 * time.Millisecond):
		}
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		if n == waiting {
			break
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file outlives the claim: %v", err)
	}
	if err := other.Release(); err != nil {
		t.Error(err)
	}
	if _, err := s.Claim(t.Context(), -1); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("claim of no index: %v", err)
	}

	dir := t.TempDir()
	t.Setenv("NBDCTL_STATE_DIR", dir)
	c, err := s.Claim(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "claims/nbd3")); err != nil {
		t.Errorf("no file in the directory of the environment: %v", err)
	}
	if err := c.Release(); err != nil {
		t.Error(err)
	}
}

func TestWaitReady(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	k.Partition(index, 2)
	partitions, err := w.WaitReady(t.Context(), index)
	w.wantDone("wait until ready", err)
	if diff := cmp.Diff([]string{fmt.Sprintf("nbd%dp2", index)}, partitions); diff != "" {
		t.Errorf("partitions (-want +got):\n%s", diff)
	}
}
