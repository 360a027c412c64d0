package nbd_test

import (
	"context"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// socketOptions returns the options of a socket that matter here, by their names.
func socketOptions(t *testing.T, c syscall.Conn) map[string]int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]int)
	err = raw.Control(func(fd uintptr) {
		for name, o := range map[string][2]int{
			"keepalive": {unix.SOL_SOCKET, unix.SO_KEEPALIVE}, "idle": {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
			"interval": {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL}, "count": {unix.IPPROTO_TCP, unix.TCP_KEEPCNT},
			"unacknowledged": {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT},
			"no delay":       {unix.IPPROTO_TCP, unix.TCP_NODELAY},
		} {
			if all[name], err = unix.GetsockoptInt(int(fd), o[0], o[1]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		linger, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER)
		if err != nil {
			t.Error(err)
		}
		all["linger"] = int(linger.Onoff)
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if err != nil {
			t.Error(err)
		}
		all["not blocking"] = flags & unix.O_NONBLOCK
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestHandOverSocket holds that the options of a socket are the same with its next owner, and after
// the one before has left, whoever has dialled; that a file can be passed on by its number without
// having the socket block; and that programs which are started meanwhile do not get it.
func TestHandOverSocket(t *testing.T) {
	u, _ := counted(t, "tcp", nil)
	own := func(context.Context) (net.Conn, error) { return net.Dial(u.Network, u.Address) }
	for name, tt := range map[string]struct {
		o    nbd.Options
		want map[string]int
	}{
		"dialled":         {nbd.Options{}, map[string]int{"idle": 10, "count": 3, "unacknowledged": 20000}},
		"by Options.Dial": {nbd.Options{Dial: own}, map[string]int{"unacknowledged": 0}},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, u, tt.o)
			h := handOver(t, c, 1)
			flags, err := unix.FcntlInt(h.Files[0].Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%v, the flags of the descriptor are %#x", err, flags)
			}
			d, files := pass(t, h)
			another := copied(t, files[0])
			defer another.Close()
			before := socketOptions(t, another)
			tt.want["linger"], tt.want["not blocking"] = 0, unix.O_NONBLOCK
			for name, n := range tt.want {
				if before[name] != n {
					t.Errorf("%s is %d at first, want %d", name, before[name], n)
				}
			}
			next, err := u.Inherit(d, files, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			defer next.Close()
			if err := h.Leave(); err != nil {
				t.Error(err)
			}
			for name, n := range socketOptions(t, another) {
				if n != before[name] {
					t.Errorf("%s is %d, and was %d", name, n, before[name])
				}
			}
			checkContent(t, next, 1)
		})
	}
}

// TestHandOverHalf holds that a connection stays here on which half a header has come.
func TestHandOverHalf(t *testing.T) {
	for _, f := range forms {
		client, far := socketpair(t)
		r := newRig(t, f, client, far, nbd.Options{})
		unread := func() (n int) {
			raw, err := client.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		whole := r.ok(query{cookie: 1 << 16})
		r.say(whole[:6])
		for unread() > 0 {
			runtime.Gosched()
		}
		handOver(t, r.c, 0).Resume()
	}
}

// TestHandOverNoFile holds that a client goes on that can't be handed over for want of a
// descriptor.
func TestHandOverNoFile(t *testing.T) {
	u, _ := counted(t, "unix", nil)
	c := dial(t, u, nbd.Options{Connections: 2})
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// One number is left.
	one, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	low := unix.Rlimit{Cur: uint64(one.Fd()) + 1, Max: limit.Max}
	one.Close()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	h, err := c.HandOver()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if checkIs(t, err, syscall.EMFILE); h != nil {
		t.Errorf("%+v", h.Document)
	}
	checkContent(t, c, 0)
	handOver(t, c, 2).Resume()
}

// TestHandOverRefused holds that a connection that was reset on its way is one that is lost, and no
// error.
func TestHandOverRefused(t *testing.T) {
	client, far := socketpairTCP(t)
	r := newRig(t, simple, client, far, nbd.Options{})
	h := handOver(t, r.c, 1)
	d, files := pass(t, h)
	far.SetLinger(0)
	far.Close()
	next := inherit(t, d, nbd.Options{}, files...)
	if _, err := next.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("a read without a server")
	}
	h.Leave()
}
