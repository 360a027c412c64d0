package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// mapped is a backend in a mapping of a file, which is half as long as the mapping: to touch the
// other half is a SIGBUS, and an EFAULT for the kernel.
type mapped struct {
	p    []byte
	sync func()
}

const mappedSize = 4 << 20

func newMapped(t *testing.T) *mapped {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "cache"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(mappedSize); err != nil {
		t.Fatal(err)
	}
	p, err := syscall.Mmap(int(f.Fd()), 0, mappedSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(p) })
	for i := 0; i < len(p); i += 4096 {
		p[i] = byte(i >> 12)
	}
	if err := f.Truncate(mappedSize / 2); err != nil {
		t.Fatal(err)
	}
	return &mapped{p: p, sync: func() {}}
}

func (m *mapped) Size() int64                              { return mappedSize }
func (m *mapped) ReadAt(p []byte, off int64) (int, error)  { return copy(p, m.p[off:]), nil }
func (m *mapped) WriteAt(p []byte, off int64) (int, error) { return copy(m.p[off:], p), nil }
func (m *mapped) Trim(off, n int64) error                  { clear(m.p[off:][:n]); return nil }
func (m *mapped) Sync() error                              { m.sync(); return nil }

func (m *mapped) Zero(off, n int64, _ backends.ZeroFlags) error { return m.Trim(off, n) }

func (m *mapped) WriteAtFUA(p []byte, off int64) (int, error) { return m.WriteAt(p, off) }

// lendingMap is one that copies on the fast path.
type lendingMap struct{ *mapped }

func (m lendingMap) ReadAtTo(w backends.Reply, off int64, n int) error {
	p := w.Buffer(n)
	if p == nil {
		return backends.ErrWouldBlock
	}
	copy(p, m.p[off:])
	return nil
}

func (m lendingMap) WriteAtFrom(r backends.Payload, off int64, n int) error {
	var p [4096]byte
	for n > 0 {
		part := p[:min(n, len(p))]
		if err := r.Into(part); err != nil {
			return err
		}
		off += int64(copy(m.p[off:], part))
		n -= len(part)
	}
	return nil
}

// records takes what is written to it.
type records chan []byte

func (r records) Write(p []byte) (int, error) {
	r <- bytes.Clone(p)
	return len(p), nil
}

// TestMemoryFault has a backend touch memory that its file does not back any more: the request
// fails, with the stack in the log, and the process, the export and the connection live on.
func TestMemoryFault(t *testing.T) {
	const gone = mappedSize / 2
	requests := map[string]call{
		"read":        {op: cmdRead, offset: gone, length: 512},
		"large read":  {op: cmdRead, offset: gone, length: 1 << 20},
		"across":      {op: cmdRead, offset: gone - 4096, length: 8192},
		"write":       {op: cmdWrite, offset: gone, data: []byte("data")},
		"large write": {op: cmdWrite, offset: gone, data: make([]byte, 1<<20)},
		"FUA":         {op: cmdWrite, flags: fua, offset: gone, data: []byte("data")},
		"trim":        {op: cmdTrim, offset: gone, length: 512},
		"zero":        {op: cmdZero, offset: gone, length: 512},
		"flush":       {op: cmdFlush},
	}
	for kind, wrap := range map[string]func(*mapped) backends.Backend{
		"plain": func(m *mapped) backends.Backend { return m },
		"fast":  func(m *mapped) backends.Backend { return lendingMap{m} },
	} {
		for name, q := range requests {
			for _, warmed := range []bool{false, true} { // by workers, and by the goroutine of the connection
				t.Run(kind+" "+name, func(t *testing.T) {
					m := newMapped(t)
					log := make(records, 100)
					e := export(t, wrap(m), server.Options{Logger: slog.New(slog.NewJSONHandler(log, nil))})
					s := connectSockets(t, e)
					if warmed {
						warm(s.client)
					}
					m.sync = func() { m.p[gone]++ }
					s.expect(eio, q)
					var record struct{ Err, Stack string }
					if err := json.Unmarshal(<-log, &record); err != nil {
						t.Fatal(err)
					}
					if !strings.Contains(record.Err, "memory fault at address 0x") ||
						!strings.Contains(record.Stack, "fault_linux_test.go") {
						t.Errorf("the log tells %q, with the stack %q", record.Err, record.Stack)
					}
					m.sync = func() {}
					if got := s.expect(0, call{op: cmdRead, offset: 4096, length: 1}); !warmed &&
						string(got) != "\x01" {
						t.Errorf("%q is read afterwards", got)
					}
					s.disconnect()
				})
			}
		}
	}
	t.Run("Sync", func(t *testing.T) {
		m := newMapped(t)
		m.sync = func() { m.p[gone]++ }
		if err := export(t, m, server.Options{}).Sync(context.Background()); err == nil {
			t.Error("no error")
		}
	})
}

// referringMap is one that gives its memory by reference.
type referringMap struct{ *mapped }

func (m referringMap) ReadAtTo(w backends.Reply, off int64, n int) error {
	w.Bytes(m.p[off:][:n])
	return nil
}

func (m referringMap) WriteAtFrom(r backends.Payload, off int64, n int) error {
	return r.Into(m.p[off:][:n])
}

// TestMemoryFaultInKernel has the kernel, or TLS, meet memory that is not there, when it sends or
// receives for a backend: the request fails, and neither its neighbours nor the connection.
func TestMemoryFaultInKernel(t *testing.T) {
	const gone = mappedSize / 2
	for network, pair := range map[string]func(testing.TB) (net.Conn, net.Conn){
		"unix": func(t testing.TB) (net.Conn, net.Conn) { a, b := socketpair(t); return a, b },
		"tcp":  tcpPair,
		"tls":  func(t testing.TB) (net.Conn, net.Conn) { return overTLS(t, certs.New(t)) },
	} {
		t.Run(network, func(t *testing.T) {
			m := newMapped(t)
			e := export(t, referringMap{m}, server.Options{})
			ours, theirs := pair(t)
			s := (&session{client: newClient(t, ours), conn: e.NewConn(theirs, nil)}).run(t)
			var calls []call
			var want []uint32
			for i := range uint64(20) {
				calls = append(calls, call{op: cmdRead, offset: i * 8192, length: 8192},
					call{op: cmdRead, offset: gone + i*8192, length: 8192},
					call{op: cmdRead, offset: gone - 512, length: 1024},
					call{op: cmdWrite, offset: gone + i*512, data: []byte("written")},
					call{op: cmdWrite, offset: gone, data: make([]byte, 128<<10)},
					call{op: cmdWrite, offset: gone - 96<<10, data: make([]byte, 128<<10)}, // across
					call{op: cmdRead, offset: gone, length: 1 << 20},
					call{op: cmdRead, offset: 1 << 20, length: 200 << 10},
					call{op: cmdWrite, offset: i * 8192, data: m.p[i*8192:][:8192]})
				want = append(want, 0, eio, eio, eio, eio, eio, eio, 0, 0)
			}
			var replies []<-chan reply
			for _, q := range calls {
				replies = append(replies, s.start(q))
			}
			for i, ch := range replies {
				p, ok := <-ch
				q := calls[i]
				if !ok || p.errno != want[i] || p.errno == 0 && q.op == cmdRead &&
					!bytes.Equal(p.data, m.p[q.offset:][:q.length]) {
					t.Fatalf("request %d, op %d of %d bytes at %d: error %d, want %d; or other bytes, or none",
						i, q.op, q.length, q.offset, p.errno, want[i])
				}
			}
			if st := e.Stats(); total(st) != len(calls) || st.Read.Errors != 60 || st.Write.Errors != 60 ||
				st.Read.Bytes != 20*(208<<10) {
				t.Errorf("stats: %d requests, %d and %d errors, %d bytes read",
					total(st), st.Read.Errors, st.Write.Errors, st.Read.Bytes)
			}
			s.disconnect()
		})
	}
}

// TestMemoryFaultMidReply has a reply begin with memory that is there, and go on with some that is
// not: the connection is lost, which does not happen a second time.
func TestMemoryFaultMidReply(t *testing.T) {
	const gone = mappedSize / 2
	q := call{op: cmdRead, offset: gone - 512<<10, length: 1 << 20}
	e := export(t, referringMap{newMapped(t)}, server.Options{})
	s := connectSockets(t, e)
	s.start(q)
	checkError(t, <-s.err, syscall.EFAULT)
	s.conn.Close()
	s.nc.Close()
	s = connectSockets(t, e)
	s.expect(eio, q)
	s.expect(eio, call{op: cmdRead, offset: gone - 512, length: 1024})
	s.expect(0, call{op: cmdRead, length: 200 << 10})
	s.expect(0, call{op: cmdRead, length: 1 << 20})
	s.disconnect()
}

func tcpPair(t testing.TB) (net.Conn, net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
