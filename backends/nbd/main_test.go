package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestMain fails when the tests leave a goroutine of the client, or a descriptor, behind.
func TestMain(m *testing.M) {
	before := len(descriptors())
	code := m.Run()
	if left := leaked(5*time.Second, before); left != "" && code == 0 {
		fmt.Fprintf(os.Stderr, "left behind:\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// leaked returns the stacks of goroutines that still run the client's code, and the descriptors
// beyond so many, once those that are about to end have had time to.
func leaked(patience time.Duration, most int) string {
	for deadline := time.Now().Add(patience); ; {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		var ours []string
		for _, g := range strings.Split(string(stacks), "\n\n") {
			if strings.Contains(g, "backends/nbd.(") {
				ours = append(ours, g)
			}
		}
		if open := descriptors(); len(open) > most {
			ours = append(ours, fmt.Sprintf("%d descriptors instead of %d: %q", len(open), most, open))
		}
		if len(ours) == 0 || time.Now().After(deadline) {
			return strings.Join(ours, "\n\n")
		}
		<-time.After(10 * time.Millisecond)
	}
}

// descriptors lists the sockets and files that this process has open. What the runtime keeps for
// itself is not in it, nor are those of systems without /proc.
func descriptors() []string {
	var all []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		what, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err == nil && !strings.HasPrefix(what, "anon_inode:") && !strings.HasPrefix(what, "pipe:") {
			all = append(all, what)
		}
	}
	return all
}

// socketpair returns the ends of a pair of Unix stream sockets, which are closed when the test
// ends.
func socketpair(t testing.TB) (client, server *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir can be longer than a socket's path may be.
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	if server, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// checkBroken fails the test unless err says that the server breaks the protocol, and how.
func checkBroken(t testing.TB, err error, why string) {
	t.Helper()
	var broken *nbd.ProtocolError
	if !errors.As(err, &broken) || !strings.Contains(err.Error(), why) {
		t.Errorf("error %v, want one of the protocol: %q", err, why)
	}
}

// checkIs fails the test unless err matches all of want.
func checkIs(t testing.TB, err error, want ...error) {
	t.Helper()
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Errorf("error %v does not match %v", err, w)
		}
	}
}

// errGivenUp is why contexts end in these tests.
var errGivenUp = errors.New("the test has given up")

// endable returns a context, and what ends it with errGivenUp.
func endable(t testing.TB) (context.Context, func()) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	t.Cleanup(func() { cancel(nil) })
	return ctx, func() { cancel(errGivenUp) }
}
