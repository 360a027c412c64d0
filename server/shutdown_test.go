package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

// TestHandOver shuts a connection down at every byte of a stream of requests, lets a second server
// go on with what the first gives back, on the same socket, and counts: every request is executed
// once and answered once.
func TestHandOver(t *testing.T) {
	calls := script()
	stream, starts := encodeScript(calls)
	want := sorted([]string{
		"write 512+512", "read 1024+512", "sync 0+0", "write-fua 2048+512", "trim 4096+512", "read 5120+512",
	})
	for way, stop := range stops {
		for cut := range len(stream) + 1 {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				ours, theirs := net.Pipe()
				unread := handOver(t, d, ours, theirs, synctest.Wait, stop, stream, cut, calls, server.Options{})
				done, _ := complete(starts, cut)
				if len(unread) != cut-starts[done] {
					t.Errorf("%s, cut at %d: %d bytes unread, want %d", way, cut, len(unread), cut-starts[done])
				}
				if diff := cmp.Diff(want, sorted(d.history())); diff != "" {
					t.Errorf("%s, cut at %d: calls of the backend (-want +got):\n%s", way, cut, diff)
				}
			})
		}
	}
}

// stops are the ways in which a Conn ends without its socket, and returns what is unread.
var stops = map[string]func(testing.TB, *server.Export, *server.Conn) []byte{
	"Shutdown": func(t testing.TB, _ *server.Export, c *server.Conn) []byte {
		if err := c.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		return c.Unread()
	},
	"Hold": func(t testing.TB, e *server.Export, c *server.Conn) []byte {
		h, err := e.Hold(t.Context(), false)
		if err != nil {
			t.Error(err)
			return nil
		}
		defer h.Leave()
		unread, ok := h.Unread(c)
		if !ok {
			t.Error("it has ended")
		}
		return unread
	},
}

// TestHandOverBacklog does it while requests wait in the receive buffer for a slow one before them:
// these are not executed, but handed over.
func TestHandOverBacklog(t *testing.T) {
	calls := script()
	stream, starts := encodeScript(calls)
	for cut := starts[2]; cut <= len(stream); cut++ {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(8192)
			d.before = func(op string, off, n int64) error { time.Sleep(time.Second); return nil }
			ours, theirs := net.Pipe()
			o := server.Options{MaxInFlight: 1}
			unread := handOver(t, d, ours, theirs, synctest.Wait, stops["Shutdown"], stream, cut, calls, o)
			// One request is executed, one has left the buffer and waits for its turn.
			if want := cut - starts[2]; len(unread) != want {
				t.Errorf("cut at %d: %d bytes unread, want %d", cut, len(unread), want)
			}
		})
	}
}

// TestHandOverSocket does it on a socket, where the server may have received any part of what was
// sent when it is shut down.
func TestHandOverSocket(t *testing.T) {
	calls := script()
	stream, _ := encodeScript(calls)
	want := sorted([]string{
		"write 512+512", "read 1024+512", "sync 0+0", "write-fua 2048+512", "trim 4096+512", "read 5120+512",
	})
	for cut := 0; cut <= len(stream); cut += 3 {
		for i, settle := range []func(){func() {}, runtime.Gosched, func() { <-time.After(time.Millisecond) }} {
			d := newDisk(8192)
			ours, theirs := socketpair(t)
			stop := stops[[]string{"Shutdown", "Hold"}[(i+cut)%2]]
			unread := handOver(t, d, ours, theirs, settle, stop, stream, cut, calls, server.Options{})
			if !bytes.Contains(stream[:cut], unread) {
				t.Errorf("cut at %d: %d bytes unread are not those that were sent", cut, len(unread))
			}
			if diff := cmp.Diff(want, sorted(d.history())); diff != "" {
				t.Errorf("cut at %d: calls of the backend (-want +got):\n%s", cut, diff)
			}
			ours.Close()
			theirs.Close()
		}
	}
}

// handOver sends stream[:cut] to one Conn and, when things have settled, the rest to another, which
// gets what the first left unread, too. It checks that each call is answered exactly once, and
// returns what was unread.
func handOver(t *testing.T, d *disk, ours, theirs net.Conn, settle func(),
	stop func(testing.TB, *server.Export, *server.Conn) []byte, stream []byte, cut int, calls []call,
	o server.Options) []byte {
	t.Helper()
	e := export(t, d, o)
	defer ours.Close()
	replies := make(chan reply, 2*len(calls))
	go func() {
		defer close(replies)
		for {
			p, err := readReply(ours, func(cookie uint64) int {
				if calls[cookie].op == cmdRead {
					return int(calls[cookie].length)
				}
				return 0
			})
			if err != nil {
				return
			}
			replies <- p
		}
	}()

	first := e.NewConn(theirs, nil)
	result := make(chan error, 1)
	go func() { result <- first.Transmit() }()
	ours.Write(stream[:cut])
	settle()
	ahead := stop(t, e, first)
	checkError(t, <-result, server.ErrShutdown)
	unread := slices.Clone(ahead)

	second := e.NewConn(theirs, ahead)
	go func() { result <- second.Transmit() }()
	ours.Write(stream[cut:])
	ours.Write(call{op: cmdDisc}.encode(0))
	checkError(t, <-result, nil)
	second.Close()

	answered := make([]int, len(calls))
	for p := range replies {
		answered[p.cookie]++
		if wantErr := calls[p.cookie].offset == 1<<40; (p.errno != 0) != wantErr {
			t.Errorf("cut at %d: request %d got error %d", cut, p.cookie, p.errno)
		}
	}
	for i, n := range answered {
		if n != 1 {
			t.Errorf("cut at %d: request %d was answered %d times", cut, i, n)
		}
	}
	if st := e.Stats(); total(st) != len(calls) || st.InFlight != 0 {
		t.Errorf("cut at %d: stats of both connections: %+v", cut, st)
	}
	return unread
}

func sorted(s []string) []string { slices.Sort(s); return s }

// TestShutdownWaits holds that Shutdown ends with its context, that what is in flight is answered
// all the same, and that a second Shutdown can wait for it.
func TestShutdownWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		d.before = func(string, int64, int64) error { time.Sleep(time.Minute); return nil }
		s := connect(t, export(t, d, server.Options{}))
		got := s.start(call{op: cmdRead, length: 512})

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		checkError(t, s.conn.Shutdown(ctx), context.DeadlineExceeded)
		if s.conn.Unread() != nil {
			t.Error("Unread gives something while requests are in flight")
		}
		checkError(t, s.conn.Shutdown(t.Context()), nil)
		synctest.Wait() // The client has the reply, and may not have looked at it yet.
		select {
		case p := <-got:
			if p.errno != 0 {
				t.Errorf("error %d", p.errno)
			}
		default:
			t.Error("Shutdown returned before the reply")
		}
		checkError(t, <-s.err, server.ErrShutdown)
	})
}

// TestLifeCycle holds what each method does in each phase of a connection's life.
func TestLifeCycle(t *testing.T) {
	e := export(t, newDisk(8192), server.Options{})
	newConn := func() (*server.Conn, net.Conn) {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { ours.Close(); theirs.Close() })
		return e.NewConn(theirs, []byte("ahead")), ours
	}

	c, _ := newConn()
	checkError(t, c.Shutdown(t.Context()), nil)
	if got := string(c.Unread()); got != "ahead" {
		t.Errorf("never served, unread %q", got)
	}
	checkError(t, c.Transmit(), server.ErrShutdown)

	c, _ = newConn()
	checkError(t, c.Close(), nil)
	checkError(t, c.Close(), nil)
	checkError(t, c.Transmit(), net.ErrClosed)

	s := connect(t, e)
	s.expect(0, call{op: cmdRead, length: 512})
	checkError(t, s.conn.Transmit(), errAny)
	s.expect(0, call{op: cmdRead, length: 512})
	s.conn.Close()
	checkError(t, <-s.err, net.ErrClosed)
	checkError(t, s.conn.Shutdown(t.Context()), nil)
	if st := e.Stats(); st.Read.Requests != 2 {
		t.Errorf("%d reads counted, want 2", st.Read.Requests)
	}
}

// TestCloseFreesBlockedReplies has a client that never takes its replies: Close must end the
// connection all the same.
func TestCloseFreesBlockedReplies(t *testing.T) {
	const reads = 32
	read := make(chan struct{}, reads)
	d := newDisk(1 << 20)
	d.before = func(string, int64, int64) error {
		read <- struct{}{}
		return nil
	}
	e := export(t, d, server.Options{})
	ours, theirs := socketpair(t)
	conn := e.NewConn(theirs, nil)
	result := make(chan error, 1)
	go func() { result <- conn.Transmit() }()
	for i := range reads {
		if _, err := ours.Write((call{op: cmdRead, length: 1 << 20}).encode(uint64(i))); err != nil {
			t.Fatal(err)
		}
	}
	for range reads { // More than a socket holds.
		<-read
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := conn.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a shutdown that cannot send its replies: %v", err)
	}
	conn.Close()
	checkError(t, <-result, net.ErrClosed)
}

// TestUnreadIsExecuted starts a connection with whole requests received by somebody else, more than
// a receive buffer holds.
func TestUnreadIsExecuted(t *testing.T) {
	d := newDisk(1 << 20)
	var ahead []byte
	var want []string
	for i := range 300 {
		q := call{op: cmdWrite, offset: uint64(i) * 512, data: make([]byte, 512)}
		ahead = append(ahead, q.encode(uint64(i))...)
		want = append(want, fmt.Sprintf("write %d+512", q.offset))
	}
	ahead = append(ahead, call{op: cmdDisc}.encode(0)...)
	ours, theirs := socketpair(t)
	conn := export(t, d, server.Options{}).NewConn(theirs, ahead)
	result := make(chan error, 1)
	go func() { result <- conn.Transmit() }()
	for i := range 300 {
		if _, err := readReply(ours, func(uint64) int { return 0 }); err != nil {
			t.Fatalf("reply %d: %v", i, err)
		}
	}
	checkError(t, <-result, nil)
	if diff := cmp.Diff(sorted(want), sorted(d.history())); diff != "" {
		t.Errorf("calls of the backend (-want +got):\n%s", diff)
	}
}
