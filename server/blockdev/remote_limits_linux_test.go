package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A fewExport is one of which no more connections can be had than that.
type fewExport struct {
	*farExport
	most int
}

var errNoMore = errors.New("no more")

func (f *fewExport) Dial(ctx context.Context) (net.Conn, error) {
	if f.count() >= f.most {
		return nil, errNoMore
	}
	return f.farExport.Dial(ctx)
}

// TestRemoteUnconnected holds that of a connect that fails nothing is left, at either end.
func TestRemoteUnconnected(t *testing.T) {
	for name, tt := range map[string]struct {
		most int
		fail syscall.Errno
		want error
	}{
		"too few connections": {2, 0, errNoMore},
		"the kernel refuses":  {3, syscall.ENOMEM, syscall.ENOMEM},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fewExport{newFarExport(t), tt.most}
			k, m, lab := labOn(t, nbdnltest.Options{})
			if tt.fail != 0 {
				k.Fail(nbdnltest.Connect, tt.fail)
			}
			lab.Connections, lab.DeadTimeout = 3, time.Hour
			if d, err := m.connectRemote(t.Context(), anyIndex, f, lab); d != nil || !errors.Is(err, tt.want) {
				t.Errorf("%v, %v", d, err)
			}
			for n := range tt.most {
				f.hasEnded(t, n)
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteStranded holds that a device from whose connections the kernel does not all receive is
// connected again with others.
func TestRemoteStranded(t *testing.T) {
	f := newFarExport(t)
	k, m, lab := labOn(t, nbdnltest.Options{})
	k.Strand(1)
	var said bytes.Buffer
	lab.Connections, lab.Logger = 2, slog.New(slog.NewTextHandler(&said, nil))
	d, err := m.connectRemote(t.Context(), anyIndex, f, lab)
	if err != nil {
		t.Fatal(err)
	}
	if f.count() != 4 || d.Alive() != 2 || strings.Contains(said.String(), "connection lost") {
		t.Errorf("%d connections were dialled, %d are alive: %s", f.count(), d.Alive(), said.String())
	}
	f.hasEnded(t, 0)
	f.hasEnded(t, 1)
	if err := d.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestRemoteLimits holds which limits of a server the kernel can keep, and that it is told.
func TestRemoteLimits(t *testing.T) {
	for _, tt := range []struct {
		maximum, block int
		sectors        string // KiB; empty: it is refused
	}{
		{0, 512, "1024"},
		{4096, 512, "4"},
		{4096, 4096, "4"},
		{64 << 10, 4096, "64"},
		{4095, 512, ""},
		{4096, 8192, ""},
	} {
		t.Run(fmt.Sprint(tt.maximum, tt.block), func(t *testing.T) {
			f := newFarExport(t)
			f.sizes = backends.BlockSizes{Minimum: 512, Maximum: tt.maximum}
			k, m, lab := labOn(t, nbdnltest.Options{})
			lab.BlockSize = tt.block
			d, err := m.connectRemote(t.Context(), 5, f, lab)
			if tt.sectors == "" {
				if !errors.Is(err, errors.ErrUnsupported) || f.count() != 0 {
					t.Errorf("%v, %d connections were dialled", err, f.count())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(k.Path("sys/block/nbd5/queue/max_sectors_kb"))
			if strings.TrimSpace(string(got)) != tt.sectors || d.Index() != 5 {
				t.Errorf("nbd%d has requests of %q KiB (%v), want %s", d.Index(), got, err, tt.sectors)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteReadOnly holds that an export which can't be written loses nothing, and that another
// may have when no connection was there for too long.
func TestRemoteReadOnly(t *testing.T) {
	for _, flag := range []wire.Flags{0, wire.FlagReadOnly} {
		f := newFarExport(t)
		f.flags |= flag
		k, d := connectedFar(t, f, Options{})
		if d.ReadOnly() != (flag != 0) {
			t.Errorf("flags %v: read-only %t", f.flags, d.ReadOnly())
		}
		f.reset()
		awaitReplaced(t, d, 1)
		var loss *LossError
		if lost := errors.As(d.Loss(), &loss) && loss.Unsent != nil; lost == d.ReadOnly() {
			t.Errorf("read-only %t: %v", d.ReadOnly(), d.Loss())
		}
		if err := d.Close(); (err == nil) != d.ReadOnly() {
			t.Errorf("read-only %t: Close: %v", d.ReadOnly(), err)
		}
		checkClean(t, k)
	}
}

// TestRemoteReconfigured holds that timeouts can be changed, and hold for the connections that come
// after.
func TestRemoteReconfigured(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{})
	timeout, deadTimeout := 7*time.Second, 9*time.Second
	if err := d.Reconfigure(t.Context(), Update{Timeout: &timeout, DeadTimeout: &deadTimeout}); err != nil {
		t.Fatal(err)
	}
	f.reset()
	awaitReplaced(t, d, 1)
	s := k.Setting(d.Index())
	if s.Timeout != 7 || s.DeadConnTimeout != 9 || d.Timeout() != timeout || d.DeadTimeout() != deadTimeout {
		t.Errorf("the kernel has %+v, the device says %v and %v", s, d.Timeout(), d.DeadTimeout())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestRemoteNothing holds that there is no device without an export, nor at a negative index.
func TestRemoteNothing(t *testing.T) {
	f := newFarExport(t)
	if d, err := ConnectRemoteIndex(t.Context(), -1, f, Options{}); d != nil || err == nil || f.count() != 0 {
		t.Errorf("a negative index: %v, %v", d, err)
	}
	if d, err := ConnectRemote(t.Context(), nil, Options{}); d != nil || err == nil {
		t.Errorf("no export: %v, %v", d, err)
	}
}

// TestRemoteSendBuffer holds that a kernel which breaks sends gets a send buffer that is large, or
// the log says that it has none, and that another is left alone.
func TestRemoteSendBuffer(t *testing.T) {
	for release, large := range map[string]bool{"6.12.0": true, "6.1.0": false} {
		f := newFarExport(t)
		_, m, lab := labOn(t, nbdnltest.Options{Release: release})
		var said bytes.Buffer
		lab.Logger = slog.New(slog.NewTextHandler(&said, nil))
		d, err := m.connectRemote(t.Context(), anyIndex, f, lab)
		if err != nil {
			t.Fatal(err)
		}
		var got int
		if err := control(d.watchedOf(0).socket, func(fd int) (err error) {
			got, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		warned := strings.Contains(said.String(), "send buffer of the kernel's connection was not enlarged")
		if is := got >= bigSendBuffer; is != (large && !warned) || warned && !large {
			t.Errorf("%s: %d bytes, and the log says %s", release, got, said.String())
		}
	}
}

// TestRemoteSet holds for how long a set of connections to another server, and one of ours, go on
// after what an attempt says, and what they have ended with.
func TestRemoteSet(t *testing.T) {
	denied, gone := fmt.Errorf("it: %w", os.ErrPermission), fmt.Errorf("it: %w", nbdnl.ErrNotOwner)
	for _, tt := range []struct {
		name        string
		remote      bool
		deadTimeout time.Duration
		says        error
		state       nbdnl.State
		ended       error
	}{
		{"away", true, time.Minute, &connectError{gone}, nbdnl.StateWaiting, nil},
		{"away, and nothing waits", true, 0, &connectError{denied}, nbdnl.StateWaiting, nil},
		{"disconnected", true, 0, gone, nbdnl.StateIdle, nil},
		{"not allowed", true, time.Minute, denied, nbdnl.StateOrphaned, errHungUp},
		{"ours, away", false, time.Minute, errHungUp, nbdnl.StateOrphaned, errHungUp},
		{"ours, and nothing waits", false, 0, errHungUp, nbdnl.StateOrphaned, errHungUp},
		{"ours, disconnected", false, time.Minute, gone, nbdnl.StateOrphaned, errHungUp},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := setOf(2, time.Second, tt.deadTimeout)
				s.remote = tt.remote
				s.refuse(tt.says)
				s.socket(0).end(errHungUp)
				s.socket(1).end(errHungUp)
				<-time.After(time.Hour)
				s.check(t, "in the end", tt.state, 0)
				if !errors.Is(s.err, tt.ended) {
					t.Errorf("ended with %v, want %v", s.err, tt.ended)
				}
				if tt.state == nbdnl.StateWaiting {
					s.refuse(nil)
					<-time.After(2 * longestPause)
					s.check(t, "with the server", nbdnl.StateLive, 2)
					s.socket(2).disconnect()
					s.socket(3).disconnect()
					s.check(t, "disconnected", nbdnl.StateIdle, 0)
				}
			})
		})
	}
}

// TestRemoteSetTells holds that a set tells of each reason for which an attempt fails, once, and
// forgets them when all connections are alive.
func TestRemoteSetTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(2, time.Second, time.Minute)
		s.remote = true
		told := func(what string, changes int, want Outage, err string) {
			t.Helper()
			synctest.Wait()
			s.mu.Lock()
			got := s.changes
			s.mu.Unlock()
			o := s.outage()
			said := fmt.Sprint(o.Err)
			if o.Err = nil; o != want || !strings.Contains(said, err) || got != changes {
				t.Errorf("%s: %+v, %s, told %d times", what, o, said, got)
				t.Errorf("%s: want %+v, %s, told %d times", what, want, err, changes)
			}
		}
		begin := time.Now()
		told("at first", 0, Outage{Alive: 2}, "<nil>")
		s.refuse(&connectError{errors.New("no route")})
		s.socket(0).end(errHungUp)
		<-time.After(time.Minute)
		told("one is lost", 2, Outage{Alive: 1}, "no route")
		s.socket(1).end(errHungUp)
		<-time.After(time.Minute)
		told("both are", 3, Outage{Since: begin.Add(time.Minute)}, "no route")
		s.refuse(&connectError{errors.New("another export")})
		<-time.After(time.Minute)
		told("another reason", 4, Outage{Since: begin.Add(time.Minute)}, "another export")
		s.refuse(nil)
		<-time.After(time.Minute)
		told("both are replaced", 6, Outage{Alive: 2, Replaced: 2}, "<nil>")
		s.cut()
		synctest.Wait()
	})
}

// TestRemoteSetLate holds that a connection whose end turns out to be the device's is no loss, and
// that none takes its place.
func TestRemoteSetLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(1, time.Second, 0)
		s.remote = true
		s.socket(0).leave(0)
		<-time.After(endPatience)
		s.check(t, "while nobody knows", nbdnl.StateWaiting, 0)
		s.socket(0).disconnect()
		s.check(t, "in the end", nbdnl.StateIdle, 0)
		if s.err != nil || len(s.misses) > 0 || len(s.sockets) != 1 || s.outage().Err != nil {
			t.Errorf("error %v, missed %v, %d sockets, %+v", s.err, s.misses, len(s.sockets), s.outage())
		}
	})
}

// TestRemoteSetSpread holds that the sets of several devices do not ask a server that comes back at
// the same moments, and that what is only between a device and its kernel waits for no chance.
func TestRemoteSetSpread(t *testing.T) {
	for _, remote := range []bool{false, true} {
		took := make(map[time.Duration]bool)
		for range 20 {
			synctest.Test(t, func(t *testing.T) {
				s := setOf(1, time.Second, time.Hour)
				s.remote = remote
				begun, attempts := time.Now(), make(chan time.Duration, 100)
				s.renew = func(context.Context) (transmitter, error) {
					attempts <- time.Since(begun)
					return nil, errHungUp
				}
				s.socket(0).end(errHungUp)
				for range 4 {
					<-attempts
				}
				took[<-attempts] = true
				s.cut()
				synctest.Wait()
			})
		}
		if alike := len(took) == 1; alike == remote || !remote && !took[150*time.Millisecond] {
			t.Errorf("remote %t: the fifth attempts come after %v", remote, took)
		}
	}
}
