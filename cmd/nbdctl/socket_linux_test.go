package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// leaveSocket leaves at path what a server that was killed leaves.
func leaveSocket(t testing.TB, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// answers tells whether somebody listens at path.
func answers(path string) bool {
	nc, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	nc.Close()
	return true
}

// TestSocketContended holds that of many servers that start at once at one path exactly
// one gets it, whether there is nothing yet or a socket that a killed one left; and that
// none takes it from a server that is there.
func TestSocketContended(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	for round := range 100 {
		if round%2 == 0 {
			leaveSocket(t, path)
		}
		const contenders = 8
		listeners := make([]net.Listener, contenders)
		errs := make([]error, contenders)
		var all sync.WaitGroup
		for i := range contenders {
			all.Go(func() { listeners[i], errs[i] = listenUnix(path) })
		}
		all.Wait()
		var winner net.Listener
		for i, l := range listeners {
			switch {
			case l != nil && winner != nil:
				t.Fatalf("round %d: two have it", round)
			case l != nil:
				winner = l
			case exit.Of(errs[i]) != exit.Busy:
				t.Errorf("round %d: %v", round, errs[i])
			}
		}
		if winner == nil || !answers(path) {
			t.Fatalf("round %d: nobody has it: %v", round, errs)
		}
		if err := winner.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("they left %v, %v", left, err)
	}
}

// TestSocketRemoved holds that a server removes the socket that it has made, and no
// other that is at the path by then.
func TestSocketRemoved(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	first, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil { // by hand
		t.Fatal(err)
	}
	second, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if !answers(path) {
		t.Error("the first removed the socket of the second")
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the second left its own: %v", err)
	}
	if err := second.Close(); err == nil {
		t.Error("closed twice")
	}
}

// TestSocketOfAnother holds that a socket at which something listens that is no server
// of this kind, or does not accept at the moment, is not removed.
func TestSocketOfAnother(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path); exit.Of(err) != exit.Busy {
		t.Errorf("a datagram socket: %v", err)
	}
	os.Remove(path)

	full, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(full)
	if err := syscall.Bind(full, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(full, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 { // fill its queue
		if nc, err := net.Dial("unix", path); err == nil {
			defer nc.Close()
		}
	}
	if _, err := listenUnix(path); exit.Of(err) != exit.Busy {
		t.Errorf("a server that does not accept: %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("it was removed: %v", err)
	}
}

// TestSocketInTheWay holds that what is no socket stays, and is named.
func TestSocketInTheWay(t *testing.T) {
	dir := shortDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	sh(t, "cd "+dir+"; echo x >file; mkdir directory; ln -s nothing dangling; ln -s file link; mkfifo pipe")
	leaveSocket(t, path("stale"))
	sh(t, "cd "+dir+"; ln -s stale stalelink")
	for name, says := range map[string]string{
		"file":      "is a regular file",
		"directory": "is a directory",
		"dangling":  "is a symbolic link to nothing, which does not exist",
		"link":      "is a symbolic link to file",
		"stalelink": "is a symbolic link to stale",
		"pipe":      "is a named pipe",
	} {
		before, err := os.Lstat(path(name))
		if err != nil {
			t.Fatal(err)
		}
		image := path("new.img")
		r := nbdctl(t, "serve", "file", image, "--create", "--size", "1M", "--listen", "unix:"+path(name))
		if r.code != int(exit.Usage) || !strings.Contains(r.stderr, path(name)+" "+says) {
			t.Errorf("serve at %s: exit code %d, %s", name, r.code, r.stderr)
		}
		if _, err := listenUnix(path(name)); exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", name, err)
		}
		if now, err := os.Lstat(path(name)); err != nil || !os.SameFile(before, now) {
			t.Errorf("%s is gone: %v", name, err)
		}
		if _, err := os.Lstat(image); !os.IsNotExist(err) {
			t.Errorf("serve at %s made an image: %v", name, err)
		}
	}
}
