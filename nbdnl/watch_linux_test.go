package nbdnl_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A watching is a Watch in a test.
type watching struct {
	*nbdnl.Watch
	t *testing.T
}

// watch watches the devices until the end of the test.
func (w world) watch() watching {
	w.Helper()
	return watchOf(w.T, w.Client)
}

func watchOf(t *testing.T, c *nbdnl.Client) watching {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Second, errors.New("the event did not come"))
	watch, err := c.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		watch.Close()
		cancel()
	})
	return watching{watch, t}
}

// want waits for the next event of a device, which must be of that kind.
func (w watching) want(index int, kind nbdnl.EventKind) nbdnl.Event {
	w.t.Helper()
	for {
		e, err := w.Next()
		if err != nil {
			w.t.Fatalf("while waiting for %v of nbd%d: %v", kind, index, err)
		}
		if e.Index != index || e.Kind == nbdnl.EventAdd && kind != nbdnl.EventAdd {
			continue
		}
		if e.Kind != kind {
			w.t.Fatalf("event is %v, want %v of nbd%d: %+v", e.Kind, kind, index, e)
		}
		if e.Time.IsZero() || e.Status.Index != index || e.Previous.Index != index {
			w.t.Errorf("event is incomplete: %+v", e)
		}
		return e
	}
}

// What only the fake kernel can be made to tell.

func TestWatchAddRemove(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	watch := w.watch()
	cfg := unserved(t)
	w.wantDone("connect", w.ConnectIndex(t.Context(), 40, cfg))
	watch.want(40, nbdnl.EventAdd)
	watch.want(40, nbdnl.EventConnect)
	w.wantDone("disconnect", w.Drop(t.Context(), 40, cfg.Identifier))
	watch.want(40, nbdnl.EventDisconnect)
	k.Remove(40)
	watch.want(40, nbdnl.EventRemove)
}

// The end of the module is not the end of the watch.
func TestWatchReload(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	watch := w.watch()
	for range 3 {
		k.Reload()
		cfg := unserved(t)
		index := w.connect(cfg)
		watch.want(index, nbdnl.EventConnect)
		k.LinkDead(index)
		watch.want(index, nbdnl.EventLinkDead)
		w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
		watch.want(index, nbdnl.EventDisconnect)
	}
}

func TestWatchIoctlDevice(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	watch := w.watch()
	k.ConnectIoctl(2, mebi)
	if e := watch.want(2, nbdnl.EventConnect); e.Status.Mode != nbdnl.ModeIoctl {
		t.Errorf("connect is %+v", e)
	}
}

// What changes besides the size is a change of state.
func TestWatchState(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	watch := w.watch()
	if err := os.WriteFile(k.Path("sys/block/nbd0/ro"), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	k.Announce("change", index)
	if e := watch.want(index, nbdnl.EventState); !e.Status.ReadOnly || e.Previous.ReadOnly {
		t.Errorf("event is %+v", e)
	}
}

// The uevent of a teardown comes before `pid` goes.
func TestWatchWaitsForTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		index := w.connect(unserved(t))
		watch := w.watch()
		write := func(size string) {
			if err := os.WriteFile(k.Path("sys/block/nbd0/size"), []byte(size), 0o644); err != nil {
				t.Fatal(err)
			}
			k.Announce("change", index)
		}
		begin := time.Now()
		write("0\n")
		time.AfterFunc(300*time.Millisecond, func() { w.wantDone("disconnect", w.DropAny(t.Context(), index)) })
		watch.want(index, nbdnl.EventDisconnect)
		if d := time.Since(begin); d < 300*time.Millisecond || d > 400*time.Millisecond {
			t.Errorf("the end was seen after %v", d)
		}

		// A device that stays without a size for long is reported as that, once.
		index = w.connect(unserved(t))
		watch.want(index, nbdnl.EventConnect)
		write("0\n")
		if e := watch.want(index, nbdnl.EventState); e.Status.State != nbdnl.StateConnecting {
			t.Errorf("event is %+v", e)
		}
		write("8\n")
		if e := watch.want(index, nbdnl.EventState); e.Status.State != nbdnl.StateLive || e.Status.Size != 4096 {
			t.Errorf("event is %+v", e)
		}
	})
}

// When nothing is heard nothing is looked at.
func TestWatchIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		index := w.connect(unserved(t))
		watch, err := w.Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		events := make(chan nbdnl.Event)
		go func() {
			defer close(events)
			for {
				e, err := watch.Next()
				if err != nil {
					return
				}
				events <- e
			}
		}()
		synctest.Wait()
		// A look would find this.
		if err := os.WriteFile(k.Path("sys/block/nbd0/size"), []byte("16\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-events:
			t.Errorf("it looked of its own accord and saw %+v", e)
		case <-time.After(time.Hour):
		}
		k.Announce("change", index)
		if e := <-events; e.Kind != nbdnl.EventResize {
			t.Errorf("event is %+v", e)
		}
		watch.Close()
		<-events
	})
}

// What a watch could not look at it looks at again.
func TestWatchGoesOnAfterAnError(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	watch := w.watch()
	write := func(size string) {
		t.Helper()
		if err := os.WriteFile(k.Path("sys/block/nbd0/size"), []byte(size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("?\n")
	k.Announce("change", index)
	if e, err := watch.Next(); err == nil || !strings.Contains(err.Error(), "not a number") {
		t.Fatalf("event is %+v, %v", e, err)
	}
	write("16\n")
	watch.want(index, nbdnl.EventResize)
}

// A kernel that is stuck does not keep a watch from seeing.
func TestWatchBesideStuckKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, k := fakeWorld(t, nbdnltest.Options{})
		index := w.connect(unserved(t))
		watch := w.watch()
		unblock := k.Block(nbdnltest.Status)
		go func() { _, _ = w.Status(t.Context(), 9) }()
		synctest.Wait()
		k.Announce("add", index) // after which it would join
		if err := os.WriteFile(k.Path("sys/block/nbd0/size"), []byte("16\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		watch.want(index, nbdnl.EventResize)
		unblock()
		synctest.Wait()
	})
}

// A forgetful is a source of uevents that says only that some were dropped.
type forgetful struct{ io.ReadCloser }

func (f forgetful) Read(p []byte) (int, error) {
	if _, err := f.ReadCloser.Read(p); err != nil {
		return 0, err
	}
	return 0, syscall.ENOBUFS
}

func TestWatchOverrun(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	open := system.Uevents
	system.Uevents = func() (io.ReadCloser, error) {
		r, err := open()
		return forgetful{r}, err
	}
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	watch := watchOf(t, c)
	cfg := unserved(t)
	index, err := c.Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	watch.want(index, nbdnl.EventConnect)
}

// So many deaths that the kernel drops some of them do not end the watch.
func TestWatchDeathsOverrun(t *testing.T) {
	w, k := fakeWorld(t, nbdnltest.Options{})
	index := w.connect(unserved(t))
	watch := w.watch()
	for range 2000 {
		k.LinkDead(index)
	}
	watch.want(index, nbdnl.EventLinkDead)
	w.wantDone("disconnect", w.DropAny(t.Context(), index))
	for {
		e, err := watch.Next()
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == nbdnl.EventDisconnect {
			break
		}
	}
}

// Where uevents can't be had, looking now and then has to do.
func TestWatchBlind(t *testing.T) {
	for _, tt := range []struct {
		name  string
		blind func(t *testing.T, k *nbdnltest.Kernel, s *nbdnl.System)
	}{
		{"no socket", func(_ *testing.T, _ *nbdnltest.Kernel, s *nbdnl.System) {
			s.Uevents = func() (io.ReadCloser, error) { return nil, os.ErrPermission }
		}},
		{"another user namespace", func(t *testing.T, k *nbdnltest.Kernel, s *nbdnl.System) {
			if err := os.Symlink("user:[4026532000]", k.Path("proc/self/ns/user")); err != nil {
				t.Fatal(err)
			}
			s.Uevents = func() (io.ReadCloser, error) { return silent{make(chan struct{})}, nil }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := nbdnltest.New(t, nbdnltest.Options{})
				system := k.System()
				tt.blind(t, k, &system)
				c, err := system.NewClient()
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				watch, err := c.Watch(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer watch.Close()
				index, err := c.Connect(t.Context(), unserved(t))
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				watching{watch, t}.want(index, nbdnl.EventConnect)
				if d := time.Since(begin); d > 2*time.Second {
					t.Errorf("seen after %v", d)
				}
			})
		})
	}
}

// A silent is a source of uevents without any.
type silent struct{ closed chan struct{} }

func (s silent) Read([]byte) (int, error) { <-s.closed; return 0, os.ErrClosed }
func (s silent) Close() error             { close(s.closed); return nil }

// A watch that can hear no more says so.
func TestWatchFails(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system := k.System()
	system.Uevents = func() (io.ReadCloser, error) { return os.Open(os.DevNull) }
	c, err := system.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	watch := watchOf(t, c)
	_, err = watch.Next()
	if !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "events have ended") {
		t.Errorf("error is %v", err)
	}
}

func TestEventKindText(t *testing.T) {
	var got []string
	for k := nbdnl.EventConnect; ; k++ {
		text, err := k.MarshalText()
		if err != nil {
			break
		}
		got = append(got, string(text))
	}
	want := []string{"connect", "disconnect", "link-dead", "resize", "state", "add", "remove"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if got := nbdnl.EventKind(99).String(); got != "EventKind(99)" {
		t.Errorf("an unknown kind is %q", got)
	}
}
