package nbdnltest_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// config returns a configuration with a connection, and the server's end of it.
func config(t *testing.T) (nbdnl.Config, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	return nbdnl.Config{
		Sockets:    []syscall.Conn{ends[0].(*net.UnixConn)},
		Size:       1 << 20,
		BlockSize:  512,
		Flags:      nbdnl.FlagSendFlush,
		Timeout:    5 * time.Second,
		Identifier: "test:kernel",
	}, ends[1]
}

func connect(t *testing.T, c *nbdnl.Client, cfg nbdnl.Config) int {
	t.Helper()
	index, err := c.Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error is %v, want one that matches %v", what, err, want)
	}
}

func wantState(t *testing.T, c *nbdnl.Client, index int, want nbdnl.State) {
	t.Helper()
	if s, err := c.Status(t.Context(), index); s.State != want || err != nil {
		t.Errorf("%s is %v, %v, want %v", nbdnl.Path(index), s.State, err, want)
	}
}

// TestConnect holds that the kernel keeps what it is told, talks to its own copy of the sockets,
// and says goodbye on them.
func TestConnect(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	c := k.Client()
	cfg, server := config(t)
	index := connect(t, c, cfg)
	want := nbdnltest.Setting{
		Size:        1 << 20,
		BlockSize:   512,
		Timeout:     5,
		ServerFlags: uint64(nbdnl.FlagHasFlags | nbdnl.FlagSendFlush),
		Identifier:  "test:kernel",
		Sockets:     1,
	}
	if diff := cmp.Diff(want, k.Setting(index)); diff != "" {
		t.Errorf("setting (-want +got):\n%s", diff)
	}
	wantState(t, c, index, nbdnl.StateLive)
	if err := cfg.Sockets[0].(*net.UnixConn).Close(); err != nil {
		t.Fatal(err)
	}
	if n := k.Dead(index); n != 0 {
		t.Errorf("%d connections are dead, for the caller has closed its copy", n)
	}
	if err := c.Drop(t.Context(), index, cfg.Identifier); err != nil {
		t.Error(err)
	}
	wantState(t, c, index, nbdnl.StateIdle)
	goodbye, err := io.ReadAll(server)
	if err != nil || len(goodbye) != 28 || !strings.HasPrefix(string(goodbye), "\x25\x60\x95\x13\x00\x00\x00\x02") {
		t.Errorf("the server has read %q, %v, want NBD_CMD_DISC", goodbye, err)
	}
	if got := k.Setting(index); got != (nbdnltest.Setting{}) {
		t.Errorf("setting of an idle device: %+v", got)
	}
}

// TestDead holds that the death of a connection is seen, and told only when the test says so.
func TestDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := nbdnltest.New(t, nbdnltest.Options{})
		c := k.Client()
		cfg, server := config(t)
		index := connect(t, c, cfg)
		watch, err := c.Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer watch.Close()
		events := make(chan nbdnl.Event)
		go func() {
			e, _ := watch.Next()
			events <- e
		}()
		server.Close()
		if n := k.Dead(index); n != 1 {
			t.Errorf("%d connections are dead, want 1", n)
		}
		synctest.Wait()
		select {
		case e := <-events:
			t.Errorf("%v was told by itself", e.Kind)
		default:
			k.LinkDead(index)
			if e := <-events; e.Kind != nbdnl.EventLinkDead || e.Index != index {
				t.Errorf("told %v of %d", e.Kind, e.Index)
			}
		}
	})
}

// TestHold holds that an opener makes an idle device busy, and keeps a disconnected one as it was.
func TestHold(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 2})
	c := k.Client()
	cfg, _ := config(t)
	_, release := k.Hold(0)
	wantState(t, c, 0, nbdnl.StateHeld)
	wantError(t, "connect", c.TryConnectIndex(t.Context(), 0, cfg), nbdnl.ErrBusy)
	if index := connect(t, c, cfg); index != 1 {
		t.Errorf("nbd%d was chosen, want the one that is free", index)
	}
	release()
	wantState(t, c, 0, nbdnl.StateIdle)

	pid, release := k.Hold(1)
	holders, err := c.Holders().Find(t.Context(), 1)
	if err != nil || len(holders) != 1 || holders[0].PID != pid {
		t.Errorf("holders are %v, %v, want process %d", holders, err, pid)
	}
	if err := c.Drop(t.Context(), 1, cfg.Identifier); err != nil {
		t.Error(err)
	}
	wantState(t, k.Client(), 1, nbdnl.StateLive) // to whoever has not disconnected it
	release()
	wantState(t, c, 1, nbdnl.StateIdle)
}

// TestOrders holds that the kernel fails, forgets and counts the commands that a test has said.
func TestOrders(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	c := k.Client()
	cfg, _ := config(t)
	k.Fail(nbdnltest.Connect, syscall.ENOMEM)
	_, err := c.Connect(t.Context(), cfg)
	wantError(t, "connect", err, syscall.ENOMEM)
	index := connect(t, c, cfg) // the next one does not fail
	if n := k.Commands(nbdnltest.Connect); n != 2 {
		t.Errorf("%d connects, want 2", n)
	}
	if n := k.Commands(nbdnltest.Disconnect); n != 0 {
		t.Errorf("%d disconnects, want none", n)
	}
	if err := c.Drop(t.Context(), index, cfg.Identifier); err != nil {
		t.Error(err)
	}
	if n := k.Commands(nbdnltest.Disconnect); n != 1 {
		t.Errorf("%d disconnects, want 1", n)
	}
}

// TestMute holds that a command whose answer is lost is executed all the same.
func TestMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := nbdnltest.New(t, nbdnltest.Options{})
		c := k.Client()
		cfg, _ := config(t)
		index := connect(t, c, cfg)
		k.Mute(nbdnltest.Disconnect)
		if err := c.Drop(t.Context(), index, cfg.Identifier); err == nil {
			t.Error("the answer has come")
		}
		wantState(t, k.Client(), index, nbdnl.StateIdle)
	})
}

// TestBlock holds that a command which is kept in the kernel keeps all others waiting.
func TestBlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := nbdnltest.New(t, nbdnltest.Options{})
		c := k.Client()
		cfg, _ := config(t)
		unblock := k.Block(nbdnltest.Connect)
		done := make(chan error, 2)
		go func() {
			_, err := c.Connect(t.Context(), cfg)
			done <- err
		}()
		synctest.Wait()
		go func() {
			_, err := c.Status(t.Context(), 3)
			done <- err
		}()
		synctest.Wait()
		if len(done) != 0 {
			t.Errorf("%d commands have ended", len(done))
		}
		unblock()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

// TestSync holds that an fsync does as the test has said.
func TestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := nbdnltest.New(t, nbdnltest.Options{})
		d, err := k.System().Open(nbdnl.Path(2), os.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		k.FailSync(2, syscall.ENOSPC)
		wantError(t, "sync", d.Sync(), syscall.ENOSPC)
		k.Hang(2)
		done := make(chan error, 1)
		go func() { done <- d.Sync() }()
		synctest.Wait()
		if len(done) != 0 {
			t.Errorf("the sync has ended: %v", <-done)
		}
		k.Release(2)
		wantError(t, "sync that hung", <-done, syscall.EIO)
		if n := k.Syncs(2); n != 2 {
			t.Errorf("%d syncs, want 2", n)
		}
	})
}

// TestOptions holds what a client meets in kernels that differ.
func TestOptions(t *testing.T) {
	cfg, _ := config(t)
	t.Run("no module", func(t *testing.T) {
		_, err := nbdnltest.New(t, nbdnltest.Options{NoModule: true}).System().NewClient()
		wantError(t, "new client", err, nbdnl.ErrNoDriver)
	})
	t.Run("no privilege", func(t *testing.T) {
		c := nbdnltest.New(t, nbdnltest.Options{NoPrivilege: true}).Client()
		_, err := c.Connect(t.Context(), cfg)
		wantError(t, "connect", err, os.ErrPermission)
		wantState(t, c, 0, nbdnl.StateIdle) // to look needs none
	})
	t.Run("hidden family", func(t *testing.T) {
		c := nbdnltest.New(t, nbdnltest.Options{HideFamily: true}).Client()
		if err := c.Probe(t.Context()); err != nil || c.Mode() != nbdnl.ModeIoctl {
			t.Errorf("mode is %v, %v, want that of ioctls", c.Mode(), err)
		}
	})
	for release, identified := range map[string]bool{"5.10.0": false, "5.14.0": true, "": true} {
		t.Run("release "+release, func(t *testing.T) {
			c := nbdnltest.New(t, nbdnltest.Options{Release: release}).Client()
			s, err := c.Status(t.Context(), connect(t, c, cfg))
			if s.HasIdentifier != identified || err != nil {
				t.Errorf("status is %+v, %v; want an identifier: %t", s, err, identified)
			}
		})
	}
}

// TestSockets holds that netlink sockets are counted until they are closed.
func TestSockets(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	c, err := k.System().NewClient()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := k.Sockets(); n != 1 {
		t.Errorf("%d sockets, want 1", n)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n := k.Sockets(); n != 0 {
		t.Errorf("%d sockets are left", n)
	}
}
