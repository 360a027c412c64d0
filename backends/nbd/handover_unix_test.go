//go:build unix && !aix

package nbd_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// pass returns what another process gets of a client that is handed over: the document by way of
// JSON, and descriptors of its own.
func pass(t testing.TB, h *nbd.Handover) (nbd.Document, []*os.File) {
	t.Helper()
	text, err := json.Marshal(h.Document)
	if err != nil {
		t.Fatal(err)
	}
	var d nbd.Document
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, f := range h.Files {
		files = append(files, copied(t, f))
	}
	return d, files
}

func copied(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "passed")
}

// handOver has a client handed over with so many of its connections.
func handOver(t testing.TB, c *nbd.Client, alive int) *nbd.Handover {
	t.Helper()
	h, err := c.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	if len(h.Files) != alive {
		h.Resume()
		t.Fatalf("%d connections go along, want %d: %+v", len(h.Files), alive, h.Document.Connections)
	}
	return h
}

// succeed makes a client of what another one hands over, which is to leave.
func succeed(t *testing.T, h *nbd.Handover, o nbd.Options) *nbd.Client {
	t.Helper()
	d, files := pass(t, h)
	return inherit(t, d, o, files...)
}

// A counter is a listener that counts connections.
type counter struct {
	net.Listener
	accepted atomic.Int64
}

func (c *counter) Accept() (net.Conn, error) {
	nc, err := c.Listener.Accept()
	if err == nil {
		c.accepted.Add(1)
	}
	return nc, err
}

// counted serves memory on a network.
func counted(t *testing.T, network string, config *tls.Config) (nbd.URI, *counter) {
	t.Helper()
	address := "localhost:0"
	if network == "unix" {
		address = t.TempDir() + "/s"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	e, err := server.NewExport(newMemory(t, 1<<20), server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{"disk": e}, TLS: config}
	c := &counter{Listener: l}
	served := make(chan error, 1)
	go func() { served <- s.Serve(c) }()
	t.Cleanup(func() {
		s.Close()
		<-served
	})
	return nbd.URI{Network: network, Address: l.Addr().String(), Export: "disk"}, c
}

// checkContent fails the test unless what is written at one place is read everywhere.
func checkContent(t *testing.T, c *nbd.Client, round int) {
	t.Helper()
	data := pattern(int64(round), 40<<10)
	for i := range 4 {
		if _, err := c.WriteAt(data, int64(i)*100<<10); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(data))
	for i := range 4 {
		if _, err := c.ReadAt(got, int64(i)*100<<10); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("round %d: %v, %s", round, err, firstDifference(got, data))
		}
	}
}

// TestHandOver hands a client over several times, and holds that its server sees the connections
// that there were at first, and that nothing is different for who uses it.
func TestHandOver(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		for _, connections := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s, %d", network, connections), func(t *testing.T) {
				u, l := counted(t, network, nil)
				first := dial(t, u, nbd.Options{Connections: connections, Reconnect: quick()})
				c := first
				for round := range 5 {
					checkContent(t, c, round)
					h := handOver(t, c, connections)
					d, files := pass(t, h)
					next, err := u.Inherit(d, files, nbd.Options{Reconnect: quick()})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { next.Close() })
					if round%2 == 0 { // The one before need not leave at once.
						checkContent(t, next, -round)
					}
					if err := h.Leave(); err != nil {
						t.Error(err)
					}
					h.Resume()
					checkLeft(t, c)
					c = next
				}
				checkContent(t, c, 99)
				if n := l.accepted.Load(); n != int64(connections) {
					t.Errorf("there were %d connections", n)
				}
				if s := c.State(); s != (nbd.State{Alive: connections}) {
					t.Errorf("the state is %+v", s)
				}
				if !cmp.Equal(c.Agreement(), first.Agreement(), cmp.AllowUnexported(nbd.Info{})) {
					t.Errorf("the agreement is %+v", c.Agreement())
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				checkLeft(t, c)
			})
		}
	}
}

// checkLeft fails the test unless a client has ended.
func checkLeft(t *testing.T, c *nbd.Client) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	_, err := c.ReadAt(make([]byte, 512), 0)
	checkIs(t, err, net.ErrClosed)
	_, err = c.WriteAt(make([]byte, 100<<10), 0)
	checkIs(t, err, net.ErrClosed)
	h, err := c.HandOver()
	if checkIs(t, err, net.ErrClosed); h != nil {
		t.Error("it is handed over once more")
	}
}

// TestHandOverSwallowsNothing holds that a client that is handed over reads nothing of what comes
// for its successor, and that all connections can go along whoever has sent last.
func TestHandOverSwallowsNothing(t *testing.T) {
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			client, far := socketpair(t)
			r := newRig(t, f, client, far, nbd.Options{})
			go r.serve()
			ctx, _ := endable(t)
			for round := range 100 {
				var all sync.WaitGroup
				for i := range 4 {
					all.Go(func() {
						off := int64(round * i)
						p := make([]byte, 1+(round*i*331)%(40<<10))
						_, err := r.c.ReadAtContext(ctx, p, off)
						if err != nil || !bytes.Equal(p, pattern(off, len(p))) {
							t.Errorf("round %d: %v, or other bytes", round, err)
						}
						if _, err := r.c.WriteAt(p, off); err != nil {
							t.Error(err)
						}
					})
				}
				all.Wait()
				h := handOver(t, r.c, 1)
				if round%5 == 4 {
					h.Resume()
					if err := h.Leave(); err != nil {
						t.Error(err)
					}
					continue
				}
				d, files := pass(t, h)
				next, err := nowhere.Inherit(d, files, nbd.Options{})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { next.Close() })
				p := make([]byte, 4<<10)
				for i := range 5 {
					if _, err := next.ReadAt(p, int64(i)); err != nil || !bytes.Equal(p, pattern(int64(i), len(p))) {
						t.Fatalf("round %d: %v, or other bytes", round, err)
					}
				}
				if err := h.Leave(); err != nil {
					t.Fatal(err)
				}
				r.c = next
			}
		})
	}
}

// socketpairTCP is socketpair for TCP.
func socketpairTCP(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close(); far.Close() })
	return nc.(*net.TCPConn), far.(*net.TCPConn)
}

// TestHandOverGoodbye holds that a client that leaves says nothing to the server, and that its
// successor says goodbye as always, without a reset.
func TestHandOverGoodbye(t *testing.T) {
	for _, f := range forms {
		for name, leave := range map[string]func(*nbd.Client, *nbd.Handover) error{
			"Leave": func(_ *nbd.Client, h *nbd.Handover) error { return h.Leave() },
			"Close": func(c *nbd.Client, h *nbd.Handover) error { return c.Close() },
		} {
			t.Run(fmt.Sprintf("%v, %s", f, name), func(t *testing.T) {
				client, far := socketpairTCP(t)
				r := newRig(t, f, client, far, nbd.Options{})
				r.works()
				h := handOver(t, r.c, 1)
				next := succeed(t, h, nbd.Options{})
				if err := leave(r.c, h); err != nil {
					t.Error(err)
				}
				checkLeft(t, r.c)
				if _, err := h.Files[0].Stat(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("the file is open: %v", err)
				}
				r.c = next
				r.works()
				closed := r.effect(next.Close)
				got, err := io.ReadAll(far)
				if want := request(f, 0, cmdDisc, 0, 0, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the last words are %x, want %x (%v)", got, want, err)
				}
				if err := (<-closed).err; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestHandOverLeavesOthers holds that connections that can't go along are told goodbye.
func TestHandOverLeavesOthers(t *testing.T) {
	authority := certs.New(t)
	local, remote := socketpair(t)
	secure := tls.Server(remote, &tls.Config{Certificates: []tls.Certificate{authority.Server}})
	shaken := make(chan error, 1)
	go func() { shaken <- secure.Handshake() }()
	client := tls.Client(local, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool})
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, structured, client, secure, nbd.Options{})
	h := handOver(t, r.c, 0)
	r.works() // Nobody else has it.
	left := r.effect(h.Leave)
	got, err := io.ReadAll(secure)
	if want := request(structured, 0, cmdDisc, 0, 0, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the last words are %x, want %x (%v)", got, want, err)
	}
	if err := (<-left).err; err != nil {
		t.Error(err)
	}
	checkLeft(t, r.c)
}

// TestHandOverTLS holds that connections with TLS are made anew, and that those without it do not
// go on where it is wanted.
func TestHandOverTLS(t *testing.T) {
	authority := certs.New(t)
	u, l := counted(t, "tcp", &tls.Config{Certificates: []tls.Certificate{authority.Server}})
	o := nbd.Options{
		TLS: &tls.Config{ServerName: "localhost", RootCAs: authority.Pool}, Connections: 2, Reconnect: quick(),
	}
	c := dial(t, u, o)
	checkContent(t, c, 0)
	h := handOver(t, c, 0)
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	changes := make(chan nbd.State, 100)
	o.Reconnect.Notify = func(s nbd.State) { changes <- s }
	next, err := u.Inherit(h.Document, nil, o)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	checkContent(t, next, 1)
	await(changes, 2)
	if n := l.accepted.Load(); n != 4 {
		t.Errorf("there were %d connections, want 4", n)
	}

	client, far := socketpair(t)
	r := newRig(t, simple, client, far, nbd.Options{})
	h = handOver(t, r.c, 1)
	d, files := pass(t, h)
	if c, err := nowhere.Inherit(d, files, o); c != nil || err == nil {
		t.Errorf("%v, %v: without TLS it goes on", c, err)
	}
	h.Resume()
	r.works()
}

// TestHandOverTwice holds that a client is handed over once at a time, and that only how that ends
// first counts.
func TestHandOverTwice(t *testing.T) {
	client, far := socketpair(t)
	r := newRig(t, extended, client, far, nbd.Options{})
	h := handOver(t, r.c, 1)
	if again, err := r.c.HandOver(); again != nil || err == nil {
		t.Errorf("%v, %v", again, err)
	}
	h.Resume()
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	if _, err := h.Files[0].Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file is open: %v", err)
	}
	r.works()
	h = handOver(t, r.c, 1)
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	h.Resume()
	checkLeft(t, r.c)
	far.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("to the server it says %d bytes, %v", n, err)
	}
}
