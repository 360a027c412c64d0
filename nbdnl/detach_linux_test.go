package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// What the kernel could not write it has dropped: a device that is kept for it would tell the next
// caller that all is well.
func TestDetachUnwritable(t *testing.T) {
	for _, force := range []bool{false, true} {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		k.FailSync(index, syscall.EIO)
		o := nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: force}
		err := w.Detach(t.Context(), index, o)
		w.wantError(err, nbdnl.ErrNotWritten)
		w.wantError(err, syscall.EIO)
		w.wantState(index, nbdnl.StateIdle)
		if n := k.Syncs(index); n != 1 {
			t.Errorf("synced %d times", n)
		}
		w.wantError(w.Detach(t.Context(), index, o), nbdnl.ErrNotConnected)
	}
}

// Who has come to use a device while its cache was written keeps it, and the caller is told both:
// nobody is told the second again.
func TestDetachUnwritableHeld(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	c := meddle(t, k, func() error { k.Hold(index); return syscall.EIO })
	err := c.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
	w.wantError(err, nbdnl.ErrBusy)
	w.wantError(err, nbdnl.ErrNotWritten)
	w.wantState(index, nbdnl.StateLive)
}

// Nothing is said of the cache of a device whose server is known to be dead, even if it can't be
// opened.
func TestDetachDeadForced(t *testing.T) {
	for _, open := range []error{nil, syscall.ENXIO} {
		_, k := fakeWorld(t, nbdnltest.Options{})
		system := k.System()
		if open != nil {
			system.Open = func(string, int) (nbdnl.Device, error) { return nil, open }
		}
		w := world{T: t, Client: newClient(t, system)}
		cfg := unserved(t)
		index := w.connect(cfg)
		k.FailSync(index, syscall.EIO)
		o := nbdnl.DetachOptions{Identifier: cfg.Identifier, Dead: true, Force: true}
		w.wantDone("detach", w.Detach(t.Context(), index, o))
		w.wantState(index, nbdnl.StateIdle)
	}
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

// A visible device is open by a descriptor that /proc shows.
type visible struct {
	nbdnl.Device
	*os.File // of that descriptor
	link     string
}

func (v visible) Sync() error { return v.Device.Sync() }

func (v visible) Close() error {
	return errors.Join(os.Remove(v.link), v.File.Close(), v.Device.Close())
}

// The sync that hangs keeps a descriptor of our own, which does not stand in the way.
func TestDetachDeadHungVisible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		cfg := unserved(t)
		index := w.connect(cfg)
		k.Hang(index)
		system := k.System()
		open := system.Open
		system.Open = func(path string, flag int) (nbdnl.Device, error) {
			d, err := open(path, flag)
			if err != nil {
				return nil, err
			}
			f, err := os.Open(os.DevNull)
			if err != nil {
				return nil, err
			}
			fds := k.Path(filepath.Join("proc", strconv.Itoa(os.Getpid()), "fd"))
			link := filepath.Join(fds, strconv.Itoa(int(f.Fd())))
			err = errors.Join(
				os.MkdirAll(fds, 0o755),
				os.Symlink(k.Path(nbdnl.Path(index)), link),
			)
			return visible{d, f, link}, err
		}
		c := newClient(t, system)
		w.wantDone("detach", c.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Dead: true}))
		w.wantState(index, nbdnl.StateIdle)
	})
}

// A state directory that takes no claim makes no device immortal.
func TestDetachWithoutClaim(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	cfg := unserved(t)
	index := w.connect(cfg)
	err := errors.Join(
		os.RemoveAll(k.Path("run/nbdctl")),
		os.MkdirAll(k.Path("run"), 0o755),
		os.WriteFile(k.Path("run/nbdctl"), nil, 0o644),
	)
	if err != nil {
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
		err := w.Detach(ctx, index, o)
		w.wantError(err, context.DeadlineExceeded)
		if errors.Is(err, nbdnl.ErrNotWritten) {
			t.Errorf("%v, though what is cached may still be written", err)
		}
		w.wantState(index, nbdnl.StateLive)

		o.Force = true
		begin := time.Now()
		w.wantError(w.Detach(t.Context(), index, o), nbdnl.ErrNotWritten)
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
	h := w.wantBusy(index, cfg.Identifier, holder.Mount, "/mnt/a b")
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
	w.wantBusy(index, cfg.Identifier, holder.Exclusive, "")
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

// What a caller found at an index may be another's by the time that it is to be detached.
func TestDetachIncarnation(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	k.ConnectIoctl(0, mebi)
	incarnation := k.System().IncarnationOf(0)
	k.Replace(0)
	if now := k.System().IncarnationOf(0); now == incarnation || now == 0 || incarnation == 0 {
		t.Fatalf("incarnation %d, and then %d", incarnation, now)
	}
	for _, force := range []bool{false, true} {
		err := w.Detach(t.Context(), 0, nbdnl.DetachOptions{Any: true, Incarnation: incarnation, Force: force})
		w.wantError(err, nbdnl.ErrNotConnected)
		w.wantState(0, nbdnl.StateLive)
	}
	k.ConnectIoctl(1, mebi)
	o := nbdnl.DetachOptions{Any: true, Incarnation: k.System().IncarnationOf(1)}
	w.wantDone("detach", w.Detach(t.Context(), 1, o))
	w.wantState(1, nbdnl.StateIdle)
}

// Uses without an identifier are told apart, too.
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
