package server_test

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A failing listener has an error for each attempt to accept, and then waits.
type failing struct {
	errs   []error
	tried  atomic.Int32 // how many of them it has had
	closed chan struct{}
}

func (l *failing) Accept() (net.Conn, error) {
	n := int(l.tried.Load())
	if n == len(l.errs) {
		<-l.closed
		return nil, net.ErrClosed
	}
	l.tried.Add(1)
	err := l.errs[n]
	return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
}

func (l *failing) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}

func (l *failing) Addr() net.Addr { return &net.UnixAddr{} }

// TestAccept holds that clients who use up descriptors do not end the server, that it does not spin
// meanwhile, and that it ends when it is closed; and that an error which does not pass ends it.
func TestAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &failing{closed: make(chan struct{})}
		for range 3 {
			l.errs = append(l.errs, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
				syscall.ECONNABORTED)
		}
		var s server.Server
		result := make(chan error, 1)
		begin := time.Now()
		go func() { result <- s.Serve(l) }()
		time.Sleep(time.Minute)
		if tried := int(l.tried.Load()); tried < len(l.errs) || len(result) > 0 {
			t.Fatalf("%d attempts of %d, %d results", tried, len(l.errs), len(result))
		}
		s.Close()
		if err := <-result; !errors.Is(err, server.ErrServerClosed) {
			t.Error(err)
		}
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("it took %v to end", took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		l := &failing{closed: make(chan struct{})}
		for range 100 {
			l.errs = append(l.errs, syscall.EMFILE)
		}
		var s server.Server
		result := make(chan error, 1)
		go func() { result <- s.Serve(l) }()
		time.Sleep(time.Minute)
		if tried := l.tried.Load(); tried < 10 || tried > 80 {
			t.Errorf("%d attempts in a minute", tried)
		}
		s.Close()
		synctest.Wait()
		if err := <-result; !errors.Is(err, server.ErrServerClosed) {
			t.Error(err)
		}
	})
	var s server.Server
	broken := &failing{errs: []error{syscall.EBADF}, closed: make(chan struct{})}
	if err := s.Serve(broken); !errors.Is(err, syscall.EBADF) {
		t.Errorf("error %v, want EBADF", err)
	}
}
