package server_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A dialer offers connections to a server in memory.
type dialer struct {
	conns  chan net.Conn
	closed chan struct{}
}

func newDialer() *dialer { return &dialer{make(chan net.Conn), make(chan struct{})} }

func (d *dialer) Accept() (net.Conn, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case <-d.closed:
		return nil, net.ErrClosed
	}
}

func (d *dialer) Close() error {
	select {
	case <-d.closed:
	default:
		close(d.closed)
	}
	return nil
}

func (d *dialer) Addr() net.Addr { return &net.UnixAddr{} }

// dial connects, and negotiates unless name is "-".
func (d *dialer) dial(t *testing.T, name string) net.Conn {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close() })
	d.conns <- theirs
	if name == "-" {
		return ours
	}
	if _, err := io.ReadFull(ours, make([]byte, len(greeting))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(ours, clientFlags(3)+option(optExportName, name)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(ours, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	return ours
}

// serve runs s, and checks at the end how it ended.
func serve(t *testing.T, s *server.Server) *dialer {
	d := newDialer()
	result := make(chan error, 1)
	go func() { result <- s.Serve(d) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-result; err != server.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	return d
}

func TestServer(t *testing.T) {
	s := &server.Server{Exports: exports(t)}
	d := serve(t, s)
	for _, name := range []string{"", "disk", ""} {
		c := newClient(t, d.dial(t, name))
		c.expect(0, call{op: cmdRead, length: 512})
		want := uint32(0)
		if name == "disk" {
			want = eperm
		}
		c.expect(want, call{op: cmdWrite, data: make([]byte, 512)})
	}
	if st := s.Exports[""].Stats(); st.Write.Requests != 2 || st.Read.Requests != 2 {
		t.Errorf("stats of one export: %+v", st)
	}
	// One who is refused leaves the server as it was.
	c := d.dial(t, "-")
	go io.WriteString(c, clientFlags(3)+option(optExportName, "no"))
	if got, _ := io.ReadAll(c); string(got) != greeting {
		t.Errorf("one who is refused hears %q", got)
	}
	newClient(t, d.dial(t, "")).expect(0, call{op: cmdRead, length: 512})
}

// TestServerShutdown holds that who is in the handshake is cut, and that a request in flight is
// answered.
func TestServerShutdown(t *testing.T) {
	release, entered := make(chan struct{}), make(chan struct{})
	disk := newDisk(8192)
	disk.before = func(string, int64, int64) error { close(entered); <-release; return nil }
	s := &server.Server{Exports: map[string]*server.Export{"": export(t, disk, server.Options{})}}
	d := serve(t, s)
	busy, idle, silent := newClient(t, d.dial(t, "")), d.dial(t, ""), d.dial(t, "-")
	got := busy.start(call{op: cmdRead, length: 512})
	<-entered

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a request in flight: %v", err)
	}
	if b, _ := io.ReadAll(silent); !strings.HasPrefix(greeting, string(b)) {
		t.Errorf("one who says nothing hears %q", b)
	}
	if b, _ := io.ReadAll(idle); len(b) > 0 {
		t.Errorf("one who asks nothing hears %q", b)
	}
	close(release)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if p, ok := <-got; !ok || p.errno != 0 {
		t.Errorf("the request in flight: %+v, %v", p, ok)
	}
	if err := s.Serve(newDialer()); err != server.ErrServerClosed {
		t.Errorf("after Shutdown: %v", err)
	}
}

// TestServerFull holds that more connections than allowed wait, over all listeners, and get their
// turn.
func TestServerFull(t *testing.T) {
	s := &server.Server{Exports: exports(t), MaxConnections: 1}
	d, other := serve(t, s), serve(t, s)
	first := d.dial(t, "")
	second := make(chan net.Conn)
	go func() { second <- other.dial(t, "") }()
	select {
	case <-second:
		t.Fatal("a second connection was accepted")
	case <-time.After(20 * time.Millisecond):
	}
	first.Close()
	newClient(t, <-second).expect(0, call{op: cmdRead, length: 512})
}

// TestServerFullShutdown holds that Serve returns on Shutdown, also where it accepts nobody because
// all places are taken.
func TestServerFullShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newDisk(8192)
		release := make(chan struct{})
		disk.before = func(string, int64, int64) error { <-release; return nil }
		s := &server.Server{Exports: map[string]*server.Export{"": export(t, disk, server.Options{})},
			MaxConnections: 1}
		d := newDialer()
		served := make(chan error, 1)
		go func() { served <- s.Serve(d) }()
		got := newClient(t, d.dial(t, "")).start(call{op: cmdRead, length: 512})
		synctest.Wait()
		over := make(chan error)
		go func() { over <- s.Shutdown(t.Context()) }()
		synctest.Wait()
		select {
		case err := <-served:
			if err != server.ErrServerClosed {
				t.Errorf("Serve: %v", err)
			}
		default:
			t.Error("Serve goes on after Shutdown")
		}
		close(release)
		if p := <-got; p.errno != 0 {
			t.Errorf("the request in flight: %+v", p)
		}
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
}

// A caller is a connection that comes from an address.
type caller struct {
	net.Conn
	from *net.TCPAddr
}

func (c caller) RemoteAddr() net.Addr { return c.from }

// TestMaxPerAddress holds that one address does not take the places of others, and has its own
// again when its clients have gone.
func TestMaxPerAddress(t *testing.T) { synctest.Test(t, testMaxPerAddress) }

func testMaxPerAddress(t *testing.T) {
	s := &server.Server{Exports: exports(t), MaxPerAddress: 2, MaxConnections: 7}
	d := serve(t, s)
	visit := func(from string) net.Conn {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { ours.Close() })
		d.conns <- caller{theirs, &net.TCPAddr{IP: net.ParseIP(from), Port: 1000}}
		return ours
	}
	greeted := func(from string) net.Conn {
		t.Helper()
		nc := visit(from)
		if got, err := io.ReadAll(io.LimitReader(nc, int64(len(greeting)))); string(got) != greeting || err != nil {
			t.Errorf("%s hears %q, %v", from, got, err)
		}
		return nc
	}
	cut := func(from string) {
		t.Helper()
		if got, _ := io.ReadAll(visit(from)); len(got) > 0 {
			t.Errorf("%s, which has its share, hears %q", from, got)
		}
	}
	greeted("192.0.2.1")
	second := greeted("::ffff:192.0.2.1") // the same
	cut("192.0.2.1")
	greeted("192.0.2.2")
	greeted("2001:db8::1")
	greeted("2001:db8::2")
	cut("2001:db8::ffff")
	greeted("2001:db8:0:1::1")
	io.WriteString(second, clientFlags(3)+option(optExportName, ""))
	io.ReadFull(second, make([]byte, 10))
	cut("192.0.2.1") // also with an export
	second.Write(call{op: cmdDisc}.encode(1))
	io.Copy(io.Discard, second)
	synctest.Wait() // The place is given back after the socket was closed.
	greeted("192.0.2.1")
	cut("192.0.2.1")
}
