package rawio

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/testdata/certs"
)

// A stream is a connection of which one direction can be ended.
type stream interface {
	net.Conn
	CloseWrite() error
}

// each runs a test with every implementation over sockets. Where there is but one, New gives it.
func each(t *testing.T, f func(t *testing.T, c Conn, nc, peer stream)) {
	for name, make := range map[string]func(net.Conn) Conn{"best": New, "portable": newPortable} {
		t.Run(name, func(t *testing.T) {
			nc, peer := socketpair(t)
			f(t, make(nc), nc, peer)
		})
	}
	a := certs.New(t)
	overTLS := func(t *testing.T, under net.Conn, peer net.Conn) {
		nc := tls.Server(under, &tls.Config{Certificates: []tls.Certificate{a.Server}})
		client := tls.Client(peer, &tls.Config{RootCAs: a.Pool, ServerName: "localhost"})
		done := make(chan error, 1)
		go func() { done <- nc.Handshake() }()
		if err := errors.Join(client.Handshake(), <-done); err != nil {
			t.Fatal(err)
		}
		f(t, New(nc), nc, client)
	}
	t.Run("TLS", func(t *testing.T) {
		nc, peer := socketpair(t)
		overTLS(t, NewUnder(nc), peer)
	})
	t.Run("TLS on something else", func(t *testing.T) {
		nc, peer := socketpair(t)
		overTLS(t, nc, peer)
	})
}

func socketpair(t *testing.T) (a, b *net.UnixConn) {
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
	if a, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// pattern is n bytes that show when they are out of place.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i * 131 >> 7)
	}
	return p
}

// A lender tells when it was asked for memory and when it got it back.
type lender struct {
	room   []byte
	lent   bool
	still  bool          // nothing was received since the last Park
	parked chan struct{} // a token for each Park
	waits  int
	yield  bool
	drains int
}

func newLender() *lender {
	return &lender{room: make([]byte, 2*MinLend), parked: make(chan struct{}, 100)}
}

func (l *lender) Lend() []byte {
	l.lent, l.still = true, false
	return l.room
}

func (l *lender) Yield(still bool) bool {
	l.still = still && l.yield
	return l.yield
}

func (l *lender) Wait() { l.waits++ }

func (l *lender) Drained() { l.drains++ }

func (l *lender) Park(still bool) {
	l.lent, l.still = false, still
	l.parked <- struct{}{}
}

func TestRecv(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		want := pattern(100 << 10)
		l := newLender()
		go func() {
			<-l.parked // It waits, and holds nothing meanwhile.
			peer.Write(want)
			peer.CloseWrite()
		}()
		var got []byte
		for {
			n, err := c.Recv(l)
			if err == io.EOF && n == 0 {
				break
			}
			if err != nil || n == 0 || !l.lent {
				t.Fatalf("after %d bytes: %d more, %v, memory lent: %v", len(got), n, err, l.lent)
			}
			got = append(got, l.room[:n]...)
			for len(l.parked) > 1 {
				<-l.parked
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes came out of %d, or others", len(got), len(want))
		}
	})
}

// TestDrained holds that nobody is told that there is nothing more while there is.
func TestDrained(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		const whole = 5*MinLend + 100
		peer.Write(pattern(whole))
		l := newLender()
		for got := 0; got < whole; {
			n, err := c.Recv(l)
			want := got+n == whole
			if o, ok := c.(*overTLS); ok && (o.under == nil || o.under.raw == nil) {
				want = false // It never knows.
			}
			if got += n; err != nil || (l.drains > 0) != want {
				t.Fatalf("after %d of %d bytes: %v, %d times drained", got, whole, err, l.drains)
			}
		}
	})
}

// TestDeadline interrupts receiving, at first with nothing there and then in the middle: no byte is
// lost.
func TestDeadline(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		past := time.Unix(1, 0)
		l := newLender()
		nc.SetReadDeadline(time.Now().Add(time.Millisecond))
		if n, err := c.Recv(l); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Recv: %d, %v", n, err)
		}
		want := pattern(1000)
		peer.Write(want)
		nc.SetReadDeadline(past)
		if n, err := c.Recv(l); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Recv of what is there: %d, %v", n, err)
		}
		nc.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		got := make([]byte, 3000)
		n, err := c.ReadFull(got, newLender())
		if n != len(want) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ReadFull: %d, %v", n, err)
		}
		nc.SetReadDeadline(time.Time{})
		peer.Write(pattern(3000)[1000:])
		if m, err := c.ReadFull(got[n:], newLender()); err != nil || !bytes.Equal(got, pattern(3000)) {
			t.Errorf("the rest: %d, %v", m, err)
		}
		peer.Write(want)
		peer.CloseWrite()
		if n, err := c.ReadFull(got, newLender()); n != len(want) || err != io.EOF {
			t.Errorf("at the end: %d, %v", n, err)
		}
		if n, err := c.ReadFull(got, newLender()); n != 0 || err != io.EOF {
			t.Errorf("behind the end: %d, %v", n, err)
		}
	})
}

// TestWait holds that a waiter hears of a wait once, and from a socket only then.
func TestWait(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		want := pattern(3000)
		got := make([]byte, len(want))
		peer.Write(want)
		there := newLender()
		if _, err := c.ReadFull(got, there); err != nil {
			t.Fatal(err)
		}
		if knowsWaits(c) && there.waits != 0 {
			t.Errorf("%d waits for what was there", there.waits)
		}
		late := &lateWriter{peer: peer, p: want}
		if _, err := c.ReadFull(got, late); err != nil || !bytes.Equal(got, want) {
			t.Fatal(err)
		}
		if late.waits != 1 {
			t.Errorf("%d waits", late.waits)
		}
	})
}

// knowsWaits reports whether c can tell what is there from what is not.
func knowsWaits(c Conn) bool {
	switch c.(type) {
	case *portable, *overTLS:
		return false
	}
	return true
}

// A lateWriter writes in pieces when it is waited for.
type lateWriter struct {
	peer  net.Conn
	p     []byte
	waits int
}

func (w *lateWriter) Wait() {
	w.waits++
	for part := range slices.Chunk(w.p, 1000) {
		w.peer.Write(part)
	}
}

// TestSend sends more pieces than one system call takes, and more bytes than the socket does.
func TestSend(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		want := pattern(1 << 20)
		for _, piece := range []int{300, 64 << 10, 1 << 20} {
			var v Vec
			for at := 0; at < len(want); at += piece {
				v.Add(want[at:min(len(want), at+piece)])
				v.Add(nil)
			}
			pieces := len(v.Bufs)
			done := make(chan error, 1)
			go func() {
				n, err := c.Send(&v, false)
				if err == nil && n != len(want) {
					err = fmt.Errorf("%d bytes sent", n)
				}
				v.Truncate(0)
				done <- err
			}()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(peer, got); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil || !bytes.Equal(got, want) {
				t.Errorf("in %d pieces: %v", pieces, err)
			}
		}
		peer.Close()
		var v Vec
		v.Add(want)
		if _, err := c.Send(&v, false); err == nil {
			t.Error("no error when the peer has gone")
		}
		nc.Close()
		if n, err := c.Send(&v, false); n != 0 || !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
		if _, err := c.Recv(newLender()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	})
}

func TestPart(t *testing.T) {
	want := pattern(100)
	var v Vec
	for _, p := range [][]byte{want[:10], nil, want[10:11], want[11:60], want[60:]} {
		v.Add(p)
	}
	for from := range 101 {
		for to := from; to <= 100; to++ {
			if part := v.Part(from, to); !bytes.Equal(bytes.Join(part.Bufs, nil), want[from:to]) {
				t.Fatalf("%d to %d: %x", from, to, part.Bufs)
			}
		}
	}
}

// counting is a connection that does more than the socket it embeds.
type counting struct {
	*net.UnixConn
	reads int
}

func (c *counting) Read(p []byte) (int, error) {
	c.reads++
	return c.UnixConn.Read(p)
}

// TestWrappedSocket holds that the methods of a type that embeds a socket are not passed by.
func TestWrappedSocket(t *testing.T) {
	nc, peer := socketpair(t)
	peer.Write([]byte("x"))
	c := &counting{UnixConn: nc}
	if n, err := New(c).Recv(newLender()); n != 1 || err != nil || c.reads != 1 {
		t.Errorf("%d bytes, %v, %d reads", n, err, c.reads)
	}
}

// TestRecords holds that what is sent over TLS is in as few records as hold it.
func TestRecords(t *testing.T) {
	each(t, func(t *testing.T, c Conn, nc, peer stream) {
		over, ok := c.(*overTLS)
		if !ok {
			return
		}
		var v Vec
		for range 32 {
			v.Add(pattern(16))
			v.Add(pattern(4 << 10))
		}
		go io.Copy(io.Discard, peer)
		counted := &writeCounter{Conn: over.nc}
		over.nc = counted
		if n, err := c.Send(&v, false); n != 32*(16+4<<10) || err != nil || counted.writes != 9 {
			t.Errorf("%d bytes, %v, in %d records", n, err, counted.writes)
		}
	})
}

type writeCounter struct {
	net.Conn
	writes int
}

func (c *writeCounter) Write(p []byte) (int, error) {
	c.writes++
	return c.Conn.Write(p)
}
