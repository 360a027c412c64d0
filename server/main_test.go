package server_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain fails when a test leaves a goroutine of the server behind.
func TestMain(m *testing.M) {
	code := m.Run()
	if left := leaked(5 * time.Second); left != "" && code == 0 {
		fmt.Fprintf(os.Stderr, "goroutines left behind:\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// leaked returns the stacks of goroutines that still run the server's code, once those that are
// about to end have had time to.
func leaked(patience time.Duration) string {
	for deadline := time.Now().Add(patience); ; {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		var ours []string
		for _, g := range strings.Split(string(stacks), "\n\n") {
			if strings.Contains(g, "nbdctl/server.(") {
				ours = append(ours, g)
			}
		}
		if len(ours) == 0 || time.Now().After(deadline) {
			return strings.Join(ours, "\n\n")
		}
		<-time.After(10 * time.Millisecond)
	}
}

var (
	errAny         = errors.New("any other error")
	errUnsupported = syscall.EOPNOTSUPP
)

// checkError fails the test unless err is what was wanted: nil, something that Is want, or, for
// errAny, something.
func checkError(t testing.TB, err, want error) {
	t.Helper()
	if want == errAny && err != nil || errors.Is(err, want) {
		return
	}
	t.Errorf("error %v, want %v", err, want)
}

// socketpair returns the ends of a pair of Unix stream sockets, which are closed when the test
// ends.
func socketpair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir can be longer than a socket's path may be.
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
