package server_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// script is a stream of requests, each on a range of its own.
func script() []call {
	block := func(b byte) []byte { return bytes.Repeat([]byte{b}, 512) }
	return []call{
		{op: cmdWrite, offset: 512, data: block('a')},
		{op: cmdRead, offset: 1024, length: 512},
		{op: cmdFlush},
		{op: cmdWrite, flags: fua, offset: 2048, data: block('b')},
		{op: cmdWrite, offset: 1 << 40, data: block('c')}, // refused: past the end
		{op: cmdTrim, offset: 4096, length: 512},
		{op: cmdRead, offset: 5120, length: 512},
	}
}

// encodeScript returns the stream, where each request begins in it, and its end. Cookies count from
// 0.
func encodeScript(calls []call) (stream []byte, starts []int) {
	for i, q := range calls {
		starts = append(starts, len(stream))
		stream = append(stream, q.encode(uint64(i))...)
	}
	return stream, append(starts, len(stream))
}

// complete returns how many requests end at or before n.
func complete(starts []int, n int) (count int, boundary bool) {
	for i, s := range starts {
		if n == s {
			return i, true
		}
		if n < s {
			return i - 1, false
		}
	}
	return len(starts) - 1, false
}

// TestKilledClient cuts the connection at every byte of a stream of requests. The server must
// execute exactly what had arrived whole, say so, leave nothing running (the bubble would not end),
// and serve the next client.
func TestKilledClient(t *testing.T) {
	calls := script()
	stream, starts := encodeScript(calls)
	for cut := range len(stream) + 1 {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(8192)
			e := export(t, d, server.Options{})
			ours, theirs := net.Pipe()
			conn := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- conn.Transmit() }()
			go io.Copy(io.Discard, ours)
			ours.Write(stream[:cut])
			synctest.Wait() // until all that can be answered is
			ours.Close()

			done, boundary := complete(starts, cut)
			err := <-result
			if want := map[bool]error{true: nil, false: io.ErrUnexpectedEOF}[boundary]; !errors.Is(err, want) {
				t.Errorf("cut at %d: %v, want %v", cut, err, want)
			}
			st := e.Stats()
			if n := total(st); n != done || st.InFlight != 0 {
				t.Errorf("cut at %d: %d requests answered, %d in flight, want %d, 0", cut, n, st.InFlight, done)
			}
			if got := bytes.Count(d.data, []byte("a")); got != 0 && done == 0 {
				t.Errorf("cut at %d: %d bytes of a write that never arrived were stored", cut, got)
			}
			conn.Close()
			next := connect(t, e)
			next.expect(0, call{op: cmdWrite, data: []byte("next")})
			next.disconnect()
		})
	}
}

// TestKilledClientSocket does it on a socket, whose client may have gone before the server looks.
func TestKilledClientSocket(t *testing.T) {
	calls := script()
	stream, starts := encodeScript(calls)
	step := 1
	if raceEnabled {
		step = 5
	}
	for cut := 0; cut <= len(stream); cut += step {
		for _, direct := range []bool{false, true} {
			d := newDisk(8192)
			var b backends.Backend = d
			if direct {
				b = directDisk{d}
			}
			e := export(t, b, server.Options{})
			ours, theirs := socketpair(t)
			conn := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- conn.Transmit() }()
			ours.Write(stream[:cut])
			ours.CloseWrite()
			done, boundary := complete(starts, cut)
			err := <-result
			if want := map[bool]error{true: nil, false: io.ErrUnexpectedEOF}[boundary]; !errors.Is(err, want) {
				t.Errorf("cut at %d: %v, want %v", cut, err, want)
			}
			if st := e.Stats(); total(st) != done || st.InFlight != 0 {
				t.Errorf("cut at %d: %d requests answered, %d in flight, want %d, 0", cut, total(st), st.InFlight, done)
			}
			if got := bytes.Count(d.data, []byte("a")); got != 0 && done == 0 {
				t.Errorf("cut at %d: %d bytes of a write that never arrived were stored", cut, got)
			}
			conn.Close()
			ours.Close()
		}
	}
}

// TestKilledClientOwesReads kills a client that has taken none of the replies, on a real socket.
func TestKilledClientOwesReads(t *testing.T) {
	e := export(t, newDisk(1<<20), server.Options{})
	for range 20 {
		ours, theirs := socketpair(t)
		conn := e.NewConn(theirs, nil)
		result := make(chan error, 1)
		go func() { result <- conn.Transmit() }()
		for i := range 64 {
			if _, err := ours.Write((call{op: cmdRead, length: 1 << 20}).encode(uint64(i))); err != nil {
				t.Fatal(err)
			}
		}
		ours.Close()
		checkError(t, <-result, errAny)
		conn.Close()
	}
	if st := e.Stats(); st.InFlight != 0 {
		t.Errorf("%d requests are in flight for ever", st.InFlight)
	}
}

// TestTornWrite ends a large write in the middle: where the stream has ended, nothing of it is
// kept; where it was interrupted, all.
func TestTornWrite(t *testing.T) {
	part := call{op: cmdWrite, data: make([]byte, 1<<20)}.encode(1)[:900_000]
	for name, tt := range map[string]struct {
		end  func(*net.UnixConn, *server.Conn)
		want int
	}{
		"ended":       {func(nc *net.UnixConn, _ *server.Conn) { nc.CloseWrite() }, 0},
		"interrupted": {func(_ *net.UnixConn, c *server.Conn) { c.Shutdown(t.Context()) }, len(part)},
	} {
		ours, theirs := socketpair(t)
		conn := export(t, newDisk(1<<20), server.Options{}).NewConn(theirs, nil)
		result := make(chan error, 1)
		go func() { result <- conn.Transmit() }()
		if _, err := ours.Write(part); err != nil {
			t.Fatal(err)
		}
		tt.end(ours, conn)
		checkError(t, <-result, errAny)
		// What was not received yet is in the socket.
		ours.CloseWrite()
		rest, err := io.ReadAll(theirs)
		if err != nil {
			t.Error(err)
		}
		if n := len(conn.Unread()) + len(rest); n != tt.want {
			t.Errorf("%s: %d bytes are left of %d, want %d", name, n, len(part), tt.want)
		}
	}
}

// total returns the number of requests that were answered.
func total(s server.Stats) int {
	return int(s.Read.Requests + s.Write.Requests + s.Flush.Requests + s.Trim.Requests + s.WriteZeroes.Requests +
		s.Unknown.Requests)
}
