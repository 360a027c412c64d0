package server_test

import (
	"encoding/binary"
	"io"
	"math"
	"net"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// vast is a device of any size that takes no memory at all.
type vast int64

func (v vast) Size() int64                              { return int64(v) }
func (v vast) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (v vast) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (v vast) Trim(off, n int64) error                  { return nil }

// TestHostileLengths holds that no length that a client may claim makes the server take memory for
// it.
func TestHostileLengths(t *testing.T) {
	e := export(t, vast(1<<40), server.Options{BlockSize: 512})
	s := connect(t, e)
	s.expect(0, call{op: cmdRead, length: 512}) // Receive buffer, request and pools are there.

	tests := []struct {
		name  string
		q     call
		errno uint32
	}{
		{"read of 4 GiB", call{op: cmdRead, length: math.MaxUint32}, einval},
		{"read of 2 GiB", call{op: cmdRead, length: 1 << 31}, einval},
		{"read just above the limit", call{op: cmdRead, length: 32<<20 + 512}, einval},
		{"longest read, past the end", call{op: cmdRead, offset: 1<<40 - 512, length: 32 << 20}, einval},
		{"trim of 4 GiB", call{op: cmdTrim, length: math.MaxUint32 &^ 511}, 0},
		{"flush of 4 GiB", call{op: cmdFlush, length: math.MaxUint32}, einval},
		{"unknown command of 4 GiB", call{op: 77, length: math.MaxUint32}, einval},
		{"zeroes over 4 GiB", call{op: cmdZero, length: math.MaxUint32 &^ 511}, 0},
	}
	for _, tt := range tests {
		if n := allocated(func() { s.expect(tt.errno, tt.q) }); n > 512<<10 {
			t.Errorf("%s: the server took %d KiB", tt.name, n>>10)
		}
	}
	if n := allocated(func() {
		s.start(call{op: cmdWrite, length: math.MaxUint32})
		checkError(t, <-s.err, errAny)
	}); n > 512<<10 {
		t.Errorf("write of 4 GiB: the server took %d KiB", n>>10)
	}
}

// allocated returns the bytes that were allocated while f ran, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A lean client repeats one request and allocates nothing itself.
type lean struct {
	nc      net.Conn
	request []byte
	reply   []byte
}

func newLean(nc net.Conn, q call) *lean {
	l := &lean{nc: nc, request: q.encode(7), reply: make([]byte, 16)}
	if q.op == cmdRead {
		l.reply = make([]byte, 16+q.length)
	}
	return l
}

func (l *lean) do(t testing.TB) {
	if _, err := l.nc.Write(l.request); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(l.nc, l.reply); err != nil {
		t.Fatal(err)
	}
	if errno := binary.BigEndian.Uint32(l.reply[4:]); errno != 0 {
		t.Fatalf("error %d", errno)
	}
}

// serveLean serves e to a lean client over a socketpair.
func serveLean(t testing.TB, e *server.Export, q call) *lean {
	ours, theirs := socketpair(t)
	return serveLeanOver(t, ours, theirs, e, q)
}

// serveLeanOver is serveLean over any connection.
func serveLeanOver(t testing.TB, ours, theirs net.Conn, e *server.Export, q call) *lean {
	return serveLeanWith(t, ours, e.NewConn(theirs, nil), q)
}

// serveLeanWith is serveLean of a connection.
func serveLeanWith(t testing.TB, ours net.Conn, conn *server.Conn, q call) *lean {
	done := make(chan error, 1)
	go func() { done <- conn.Transmit() }()
	t.Cleanup(func() {
		ours.Close()
		if err := <-done; err != nil {
			t.Errorf("Transmit: %v", err)
		}
	})
	return newLean(ours, q)
}

// still is a device of any size whose every byte is the same memory, which it gives by reference.
type still struct {
	vast
	data []byte
}

func (s still) ReadAtTo(w backends.Reply, off int64, n int) error {
	for n > 0 {
		p := s.data[:min(n, len(s.data))]
		w.Bytes(p)
		n -= len(p)
	}
	return nil
}

func (s still) WriteAtFrom(r backends.Payload, off int64, n int) error {
	for n > 0 {
		p := s.data[:min(n, len(s.data))]
		if err := r.Into(p); err != nil {
			return err
		}
		n -= len(p)
	}
	return nil
}

// TestAllocations holds that a request allocates nothing once the pools are warm, whichever way it
// takes: answered by reference, by a copy, by a worker, or from a file.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates, and makes pools forget")
	}
	devices := map[string]backends.Backend{
		"plain":     vast(1 << 40),
		"unwilling": unwilling{vast(1 << 40)},
		"direct":    still{vast(1 << 40), make([]byte, 1<<20)},
		"copying":   copying{vast(1 << 40)},
		"sent":      newFiled(t, make([]byte, 1<<20)),
	}
	tests := map[string]call{
		"read 4k":    {op: cmdRead, length: 4096},
		"read 128k":  {op: cmdRead, length: 128 << 10},
		"read 1M":    {op: cmdRead, length: 1 << 20},
		"write 4k":   {op: cmdWrite, data: make([]byte, 4096)},
		"write 128k": {op: cmdWrite, data: make([]byte, 128<<10)},
		"write 1M":   {op: cmdWrite, data: make([]byte, 1<<20)},
		"write FUA":  {op: cmdWrite, flags: fua, data: make([]byte, 4096)},
		"flush":      {op: cmdFlush},
		"trim":       {op: cmdTrim, length: 1 << 30},
		"zero":       {op: cmdZero, length: 1 << 20},
	}
	for device, b := range devices {
		for name, q := range tests {
			if device == "sent" && q.op != cmdRead {
				continue // A file for reading.
			}
			t.Run(device+" "+name, func(t *testing.T) {
				allocates(t, 0, serveLean(t, export(t, b, server.Options{}), q))
			})
		}
	}
	authority := certs.New(t)
	for _, device := range []string{"plain", "direct"} {
		for name, q := range tests {
			t.Run(device+" "+name+" over TLS", func(t *testing.T) {
				ours, theirs := overTLS(t, authority)
				l := serveLeanOver(t, ours, theirs, export(t, devices[device], server.Options{}), q)
				// crypto/tls allocates a reader for each time that it has to read from the socket,
				// here on both sides (readFromUntil), and is given all that a record holds.
				records := (len(l.request)+len(l.reply))/(16<<10) + 2
				allocates(t, float64(records), l)
			})
		}
	}
}

// allocates checks that a request takes no more than most allocations, in client and server.
func allocates(t *testing.T, most float64, l *lean) {
	for range 100 {
		l.do(t)
	}
	// A collection in between empties the pools, which costs a few allocations: hence not exactly
	// 0.
	if n := testing.AllocsPerRun(500, func() { l.do(t) }); n >= most+0.1 {
		t.Errorf("%v allocations per request", n)
	}
}

// unwilling is a device that leaves everything to workers.
type unwilling struct{ vast }

func (unwilling) Sync() error { return nil }

func (unwilling) ReadAtTo(w backends.Reply, off int64, n int) error {
	return backends.ErrWouldBlock
}

func (unwilling) WriteAtFrom(r backends.Payload, off int64, n int) error {
	return backends.ErrWouldBlock
}

// copying is a device that needs the server's memory for what is read.
type copying struct{ vast }

func (copying) ReadAtTo(w backends.Reply, off int64, n int) error {
	if w.Buffer(n) == nil {
		return backends.ErrWouldBlock
	}
	return nil
}

func BenchmarkTransmit(b *testing.B) {
	for name, q := range map[string]call{
		"read4k":    {op: cmdRead, length: 4096},
		"read128k":  {op: cmdRead, length: 128 << 10},
		"write4k":   {op: cmdWrite, data: make([]byte, 4096)},
		"write128k": {op: cmdWrite, data: make([]byte, 128<<10)},
	} {
		b.Run(name, func(b *testing.B) {
			benchmarkTransmit(b, q, false)
		})
		b.Run(name+", ledger", func(b *testing.B) {
			benchmarkTransmit(b, q, true)
		})
	}
}

func benchmarkTransmit(b *testing.B, q call, ledger bool) {
	ours, theirs := socketpair(b)
	conn := export(b, vast(1<<40), server.Options{}).NewConn(theirs, nil)
	if ledger {
		conn.SetLedger(new(atomic.Uint32))
	}
	l := serveLeanWith(b, ours, conn, q)
	b.ReportAllocs()
	b.SetBytes(int64(len(l.request) + len(l.reply)))
	for b.Loop() {
		l.do(b)
	}
}
