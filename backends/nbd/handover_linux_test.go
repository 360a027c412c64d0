package nbd_test

import (
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
// the one before has left; whoever passes a file on by its number must not have it block.
func TestHandOverSocket(t *testing.T) {
	u, _ := counted(t, "tcp", nil)
	c := dial(t, u, nbd.Options{})
	h := handOver(t, c, 1)
	d, files := pass(t, h)
	own := copied(t, files[0])
	defer own.Close()
	before := socketOptions(t, own)
	if before["idle"] != 10 || before["unacknowledged"] != 20000 || before["linger"] != 0 ||
		before["not blocking"] == 0 {
		t.Errorf("at first the options are %v", before)
	}
	next, err := u.Inherit(d, files, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	for name, n := range socketOptions(t, own) {
		if n != before[name] {
			t.Errorf("%s is %d, and was %d", name, n, before[name])
		}
	}
	checkContent(t, next, 1)
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
