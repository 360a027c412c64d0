package server_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

// listenOn listens on an address that nobody else has.
func listenOn(t testing.TB, network string) net.Listener {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "nbd") // t.TempDir can be longer than a socket's path may be.
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		address = filepath.Join(dir, "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serveOn runs s on l, and returns what takes the result of Serve. The test waits for that in the
// end.
func serveOn(t testing.TB, s *server.Server, l net.Listener) <-chan error {
	result, over := make(chan error, 1), make(chan struct{})
	go func() {
		result <- s.Serve(l)
		close(over)
	}()
	t.Cleanup(func() {
		s.Close()
		<-over
	})
	return result
}

// copyOf returns a listener on a copy of the descriptor.
func copyOf(t testing.TB, l net.Listener) net.Listener {
	t.Helper()
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	copied, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { copied.Close() })
	return copied
}

// copyConn returns a connection on a copy of the descriptor.
func copyConn(t testing.TB, nc net.Conn) net.Conn {
	t.Helper()
	f, err := nc.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	copied, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { copied.Close() })
	return copied
}

// dialTo connects to a listener.
func dialTo(t testing.TB, l net.Listener) net.Conn {
	t.Helper()
	nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc
}

// greeted waits for the greeting of a server.
func greeted(t testing.TB, nc net.Conn) {
	t.Helper()
	b := make([]byte, len(greeting))
	if _, err := io.ReadFull(nc, b); err != nil || string(b) != greeting {
		t.Fatalf("greeted with %q, %v", b, err)
	}
}

// clientOf connects to a listener and chooses an export.
func clientOf(t *testing.T, l net.Listener, name string, options ...string) net.Conn {
	t.Helper()
	nc := dialTo(t, l)
	greeted(t, nc)
	choose(t, nc, name, options...)
	return nc
}

// hold has a server stand still.
func hold(t testing.TB, s *server.Server) *server.ServerHold {
	t.Helper()
	h, err := s.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Release)
	return h
}

// resume has another server go on with a client, from what was written down.
func resume(t testing.TB, s *server.Server, held server.Held) *server.Session {
	t.Helper()
	written, err := json.Marshal(held.Agreement)
	if err != nil {
		t.Fatal(err)
	}
	var agreed server.Agreement
	if err := json.Unmarshal(written, &agreed); err != nil {
		t.Fatal(err)
	}
	session, err := s.Resume(copyConn(t, held.NetConn()), agreed, slices.Clone(held.Unread))
	if err != nil {
		t.Fatal(err)
	}
	return session
}

// A dialect is a form in which clients speak, and are answered.
type dialect struct {
	options  []string
	extended bool
}

var dialects = []dialect{
	{},
	{options: []string{option(optStructured, ""), option(optSetMeta, metaData("x", "base:allocation"))}},
	{options: []string{option(optExtended, ""), option(optSetMeta, metaData("x", "base:allocation"))}, extended: true},
}

// calls are requests, each on a range of its own. Their cookies count from 0.
func (d dialect) calls() []call {
	calls := append(script(),
		call{op: cmdWrite, offset: 1 << 16, data: bytes.Repeat([]byte("large"), 20000)},
		call{op: cmdRead, offset: 8192, length: 4096})
	if len(d.options) > 0 {
		calls = append(calls, call{op: cmdBlockStatus, offset: 16384, length: 4096})
	}
	return calls
}

func (d dialect) stream() (stream []byte) {
	for i, q := range d.calls() {
		switch {
		case !d.extended:
			stream = append(stream, q.encode(uint64(i))...)
		case q.op == cmdWrite:
			q.flags |= payloadLen
			stream = append(stream, q.encodeExtended(uint64(i), uint64(len(q.data)))...)
		default:
			stream = append(stream, q.encodeExtended(uint64(i), uint64(q.length))...)
		}
	}
	return stream
}

// answers reads the replies to all calls, in whatever order they come.
func (d dialect) answers(r io.Reader) (map[uint64]string, error) {
	calls := d.calls()
	got := make(map[uint64]string)
	for range calls {
		var h [16]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return got, err
		}
		cookie := binary.BigEndian.Uint64(h[8:])
		if _, again := got[cookie]; again || cookie >= uint64(len(calls)) {
			return got, fmt.Errorf("one more reply to %d", cookie)
		}
		all, q := io.MultiReader(bytes.NewReader(h[:]), r), calls[cookie]
		var answer any
		var err error
		switch {
		case binary.BigEndian.Uint32(h[:]) == 0x67446698:
			answer, err = readReply(all, func(uint64) int {
				if q.op == cmdRead {
					return int(q.length)
				}
				return 0
			})
		case d.extended:
			answer, err = readExtended(all, cookie, q.offset)
		default:
			answer, err = readChunks(all, cookie)
		}
		if err != nil {
			return got, fmt.Errorf("reply to %d: %w", cookie, err)
		}
		got[cookie] = fmt.Sprintf("%v", answer)
	}
	return got, nil
}

// A pair is a server and the one that goes on in its place. Export x of both has the same disk.
type pair struct {
	disk      *disk
	old, next *server.Server
	out       chan int // how many exports were asked for and not given back by the clients of old
}

func newPair(t testing.TB) *pair {
	p := &pair{disk: newDisk(1 << 20), next: new(server.Server), out: make(chan int, 1)}
	p.out <- 0
	x := export(t, p.disk, server.Options{})
	p.old = &server.Server{Lookup: func(string) (*server.Export, func()) {
		p.out <- <-p.out + 1
		return x, func() { p.out <- <-p.out - 1 }
	}}
	p.next.Exports = map[string]*server.Export{"x": export(t, p.disk, server.Options{})}
	return p
}

// TestHoldLeave has a server leave clients of all kinds to another one, somewhere in a stream of
// requests: each request is executed once, and answered once with what it is answered otherwise.
func TestHoldLeave(t *testing.T) {
	want, calls := make([]map[uint64]string, len(dialects)), []string(nil)
	undisturbed := newPair(t)
	l := listenOn(t, "unix")
	serveOn(t, undisturbed.next, l)
	for i, d := range dialects {
		nc := clientOf(t, l, "x", d.options...)
		go nc.Write(d.stream())
		var err error
		if want[i], err = d.answers(nc); err != nil {
			t.Fatal(err)
		}
		calls = append(calls, undisturbed.disk.history()...)
	}
	calls = sorted(slices.Repeat(calls, 2)) // Each of them is there over TCP, too.

	const cuts = 60
	for cut := range cuts + 1 {
		p := newPair(t)
		var listeners []net.Listener
		var serving []<-chan error
		type speaker struct {
			dialect int
			nc      net.Conn
		}
		var clients []speaker
		for _, network := range []string{"tcp", "unix"} {
			l := listenOn(t, network)
			listeners, serving = append(listeners, l), append(serving, serveOn(t, p.old, l))
			for i, d := range dialects {
				clients = append(clients, speaker{i, clientOf(t, l, "x", d.options...)})
			}
		}
		type outcome struct {
			speaker
			got map[uint64]string
			err error
		}
		outcomes := make(chan outcome)
		for _, c := range clients {
			stream := dialects[c.dialect].stream()
			c.nc.Write(stream[:len(stream)*cut/cuts])
			go func() {
				got, err := dialects[c.dialect].answers(c.nc)
				outcomes <- outcome{c, got, err}
			}()
		}
		[]func(){func() {}, runtime.Gosched, func() { <-time.After(time.Millisecond) }}[cut%3]()
		h := hold(t, p.old)
		executed := p.disk.history()
		for _, c := range clients {
			stream := dialects[c.dialect].stream()
			go c.nc.Write(stream[len(stream)*cut/cuts:])
		}
		held := h.Sessions()
		if len(held) != len(clients) {
			t.Fatalf("cut %d: %d clients go along, want %d", cut, len(held), len(clients))
		}
		var resumed []*server.Session
		for _, one := range held {
			if !slices.ContainsFunc(dialects, func(d dialect) bool { return bytes.Contains(d.stream(), one.Unread) }) {
				t.Errorf("cut %d: %d bytes unread are not those that were sent", cut, len(one.Unread))
			}
			resumed = append(resumed, resume(t, p.next, one))
		}
		if n := p.disk.history(); len(n) > 0 {
			t.Errorf("cut %d: executed in the hold: %q", cut, n)
		}
		h.Leave()
		if err := p.old.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, result := range serving {
			checkError(t, <-result, server.ErrServerClosed)
			if _, err := os.Stat(listeners[i].Addr().String()); i == 1 && err != nil {
				t.Errorf("the socket's file: %v", err)
			}
		}
		if out := <-p.out; out != 0 {
			t.Errorf("cut %d: %d exports are out", cut, out)
		}
		ended := make(chan error)
		for _, session := range resumed {
			go func() { ended <- p.next.ServeSession(session) }()
		}
		for range clients {
			o := <-outcomes
			if diff := cmp.Diff(want[o.dialect], o.got); diff != "" || o.err != nil {
				t.Errorf("cut %d: dialect %d: %v, replies (-want +got):\n%s", cut, o.dialect, o.err, diff)
			}
			o.nc.Close()
		}
		for range resumed {
			checkError(t, <-ended, nil)
		}
		if diff := cmp.Diff(calls, sorted(append(executed, p.disk.history()...))); diff != "" {
			t.Errorf("cut %d: calls of the backend (-want +got):\n%s", cut, diff)
		}
	}
}
