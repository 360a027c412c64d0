package server_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// warm makes quick reads and writes until no plain call needs a worker any more.
func warm(c *client) {
	for range 100 {
		c.expect(0, call{op: cmdRead, offset: 4096, length: 512})
		c.expect(0, call{op: cmdWrite, offset: 4096, data: make([]byte, 512)})
		c.expect(0, call{op: cmdTrim, offset: 4096, length: 512})
	}
}

// TestFailuresWithoutWorkers is what a failing backend may do when it is called on the connection's
// own goroutine: the client gets an error for this request, and goes on.
func TestFailuresWithoutWorkers(t *testing.T) {
	tests := []struct {
		name  string
		fail  func() error
		errno uint32
	}{
		{"error", func() error { return syscall.ENOSPC }, enospc},
		{"panic", func() error { panic("boom") }, eio},
		{"goexit", func() error { runtime.Goexit(); return nil }, eio},
		{"would block", func() error { return backends.ErrWouldBlock }, eio},
	}
	requests := map[string]call{
		"read":        {op: cmdRead, length: 512},
		"long read":   {op: cmdRead, length: 1 << 20},
		"write":       {op: cmdWrite, data: []byte("data")},
		"large write": {op: cmdWrite, data: make([]byte, 1<<20)},
		"trim":        {op: cmdTrim, length: 512},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, direct := range []bool{false, true} {
				d := newDisk(1 << 20)
				var b backends.Backend = d
				if direct {
					b = directDisk{d}
				}
				e := export(t, b, server.Options{})
				s := connect(t, e)
				warm(s.client)
				before := e.Stats()
				d.before = func(op string, off, n int64) error {
					if off == 0 {
						return tt.fail()
					}
					return nil
				}
				for _, q := range requests {
					s.expect(tt.errno, q)
					s.expect(0, call{op: cmdRead, offset: 4096, length: 512})
				}
				s.disconnect()
				after := e.Stats()
				if n := total(after) - total(before); n != 2*len(requests) || after.InFlight != 0 {
					t.Errorf("%d requests counted, %d in flight", n, after.InFlight)
				}
			}
		})
	}
}

// A directDisk is a disk that answers without blocking: the failures of its disk come from the fast
// methods, too.
type directDisk struct{ *disk }

func (d directDisk) ReadAtTo(w backends.Reply, off int64, n int) error {
	p := w.Buffer(n)
	if p == nil {
		return backends.ErrWouldBlock
	}
	_, err := d.ReadAt(p, off)
	return err
}

func (d directDisk) WriteAtFrom(r backends.Payload, off int64, n int) error {
	if err := d.call("write-from", off, int64(n), func() {}); err != nil {
		return err
	}
	// In two pieces, of which the first is small.
	for _, p := range [][]byte{d.data[off : off+min(100, int64(n))], d.data[off+min(100, int64(n)) : off+int64(n)]} {
		if err := r.Into(p); err != nil {
			return err
		}
	}
	return nil
}

// TestHandOverLargeWrite shuts a connection down while a large write is arriving, which goes to its
// place at once, and lets another one go on. The write must not be acknowledged before it is whole,
// and must be whole in the end.
func TestHandOverLargeWrite(t *testing.T) {
	payload := make([]byte, 200<<10)
	for i := range payload {
		payload[i] = byte(i * 13 >> 4)
	}
	for _, direct := range []bool{true, false} {
		for _, cut := range []int{27, 28, 29, 28 + 99, 28 + 100, 28 + 101, 28 + 4068, 28 + 5000, 28 + 150000,
			28 + 200<<10 - 1} {
			for _, failing := range []bool{false, true} {
				d := newDisk(1 << 20)
				var b backends.Backend = d
				if direct {
					b = directDisk{d}
				}
				begun := make(chan struct{}, 10)
				d.before = func(op string, off, n int64) error {
					begun <- struct{}{}
					if failing {
						return syscall.ENOSPC
					}
					return nil
				}
				e := export(t, b, server.Options{})
				stream := call{op: cmdWrite, offset: 512, data: payload}.encode(7)
				ours, theirs := socketpair(t)
				result := make(chan error, 1)
				first := e.NewConn(theirs, nil)
				go func() { result <- first.Transmit() }()
				sent := make(chan struct{})
				go func() { ours.Write(stream[:cut]); close(sent) }()
				if direct && cut > 28 {
					<-begun // Some of the payload is in its place, maybe all that was sent.
				}
				if err := first.Shutdown(t.Context()); err != nil {
					t.Fatal(err)
				}
				checkError(t, <-result, server.ErrShutdown)
				unread := slices.Clone(first.Unread())
				if !bytes.Equal(unread, stream[:len(unread)]) {
					t.Fatalf("cut at %d: the %d bytes unread are not those that were sent", cut, len(unread))
				}
				second := e.NewConn(theirs, first.Unread())
				go func() { result <- second.Transmit() }()
				<-sent
				if _, err := ours.Write(stream[cut:]); err != nil {
					t.Fatal(err)
				}
				p, err := readReply(ours, func(uint64) int { return 0 })
				if want := map[bool]uint32{true: enospc}[failing]; err != nil || p.errno != want || p.cookie != 7 {
					t.Errorf("cut at %d: %+v, %v", cut, p, err)
				}
				ours.Close()
				checkError(t, <-result, nil)
				if !failing && !bytes.Equal(d.data[512:512+len(payload)], payload) {
					t.Errorf("cut at %d: what is stored is not what was sent", cut)
				}
				if n := total(e.Stats()); n != 1 {
					t.Errorf("cut at %d: %d requests answered", cut, n)
				}
			}
		}
	}
}

// TestStuckCallDelaysNobody has a backend that has proved quick get stuck: other connections do not
// notice, and Close and Shutdown do not wait for it longer than told to.
func TestStuckCallDelaysNobody(t *testing.T) {
	d := newDisk(1 << 20)
	release, entered := make(chan struct{}), make(chan struct{})
	d.before = func(op string, off, n int64) error {
		if off == 0 {
			close(entered)
			<-release
		}
		return nil
	}
	e := export(t, d, server.Options{})
	s, other := connectSockets(t, e), connectSockets(t, e)
	warm(s.client)
	got := s.start(call{op: cmdRead, length: 512})
	<-entered
	other.expect(0, call{op: cmdRead, offset: 4096, length: 512})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	checkError(t, s.conn.Shutdown(ctx), context.DeadlineExceeded)
	if err := s.conn.Close(); err != nil {
		t.Error(err)
	}
	close(release)
	checkError(t, <-s.err, net.ErrClosed)
	if p, ok := <-got; ok && p.errno != 0 {
		t.Errorf("error %d", p.errno)
	}
	other.disconnect()
}

// TestTurnsSlow holds that a backend whose reads turn slow gets workers without being told to: it
// costs one stall, and from then on a full queue of reads is served side by side, with no quick
// request waiting for any of them.
func TestTurnsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pause = time.Second
		d := newDisk(1 << 20)
		s := connect(t, export(t, d, server.Options{}))
		warm(s.client)
		d.before = func(op string, off, n int64) error {
			if op == "read" && off == 0 {
				time.Sleep(pause)
			}
			return nil
		}
		start := time.Now()
		s.expect(0, call{op: cmdRead, length: 512})
		if took := time.Since(start); took != pause {
			t.Errorf("the first slow read took %v", took)
		}
		start = time.Now()
		var slow []<-chan reply
		for range 32 {
			slow = append(slow, s.start(call{op: cmdRead, length: 512}))
		}
		s.expect(0, call{op: cmdRead, offset: 4096, length: 512})
		s.expect(0, call{op: cmdWrite, offset: 4096, data: []byte("quick")})
		if took := time.Since(start); took != 0 {
			t.Errorf("quick requests beside slow ones took %v", took)
		}
		for _, ch := range slow {
			<-ch
		}
		if took := time.Since(start); took != pause {
			t.Errorf("32 reads of %v took %v", pause, took)
		}
		s.disconnect()
	})
}

// TestSendFile has replies come from a file.
func TestSendFile(t *testing.T) {
	want := make([]byte, 1<<20)
	for i := range want {
		want[i] = byte(i * 7 >> 3)
	}
	b := newFiled(t, want)
	s := connectSockets(t, export(t, b, server.Options{}))
	for _, n := range []uint32{1, 4096, 128 << 10, 1 << 20} {
		var replies []<-chan reply
		for i := range uint64(8) {
			replies = append(replies, s.start(call{op: cmdRead, offset: i * 17 % (1<<20 - uint64(n) + 1), length: n}))
		}
		for i, ch := range replies {
			off := uint64(i) * 17 % (1<<20 - uint64(n) + 1)
			if p := <-ch; p.errno != 0 || !bytes.Equal(p.data, want[off:off+uint64(n)]) {
				t.Errorf("%d bytes at %d: error %d, %d bytes", n, off, p.errno, len(p.data))
			}
		}
	}
	// The file has become shorter: one request fails, and nothing else.
	if err := b.f.Truncate(1 << 19); err != nil {
		t.Fatal(err)
	}
	s.expect(eio, call{op: cmdRead, length: 1 << 20})
	s.expect(eio, call{op: cmdRead, offset: 1 << 19, length: 128 << 10})
	if got := s.expect(0, call{op: cmdRead, length: 1 << 19}); !bytes.Equal(got, want[:1<<19]) {
		t.Error("what is left of the file is not read")
	}
	s.disconnect()
}

// filed is a backend that has its replies sent from a file, where that is possible.
type filed struct {
	f    *os.File
	size int64
}

func newFiled(t *testing.T, data []byte) *filed {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	return &filed{f: f, size: int64(len(data))}
}

func (b *filed) Size() int64                             { return b.size }
func (b *filed) ReadAt(p []byte, off int64) (int, error) { return b.f.ReadAt(p, off) }

func (b *filed) ReadAtTo(w backends.Reply, off int64, n int) error {
	if w.File(b.f, off, n) {
		return nil
	}
	return backends.ErrWouldBlock
}
