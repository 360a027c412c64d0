package main

import (
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	nbd "github.com/nbdctl/nbdctl/server"
)

// A liar is a backend that does something wrong once it is told to.
type liar struct {
	store []byte
	flip  func(n int) int // which of n bytes that are read has a wrong bit; nil: none
	loses bool            // writes
	lies  atomic.Bool
}

func (l *liar) Size() int64 { return int64(len(l.store)) }

func (l *liar) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, l.store[off:])
	if l.flip != nil && l.lies.Load() {
		p[l.flip(n)] ^= 1
	}
	return n, nil
}

func (l *liar) WriteAt(p []byte, off int64) (int, error) {
	if l.loses && l.lies.Load() {
		return len(p), nil
	}
	return copy(l.store[off:], p), nil
}

// withClients is a workspace that has the clients.
func withClients(t *testing.T) *workspace {
	t.Helper()
	w := withLoadgen(t)
	for _, argv := range [][]string{
		{"gcc", "-std=gnu17", "-O2", "-pthread", "-o", w.path("libnbd"),
			"libnbd.c", "client.c", "cpu.c", "-lnbd", "-lssl", "-lcrypto"},
		{"go", "build", "-o", w.path("goclient"), "../goclient"},
	} {
		if err := run(t.Context(), "load", argv...); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func TestClientsFindFaults(t *testing.T) {
	w := withClients(t)
	first := func(int) int { return 0 }
	middle := func(n int) int { return n / 2 }
	last := func(n int) int { return n - 1 }
	tests := []struct {
		name string
		load load // none: verify
		flip func(int) int
		lost bool
		want string // in the error; "": none
	}{
		{name: "right", load: rr4k},
		{name: "right writes", load: rw4k},
		{name: "right, large", load: sr1mQ4},
		{name: "right large writes", load: rw128k},
		{name: "right, verified"},
		{name: "read, first byte", load: rr4k, flip: first, want: "wrong data"},
		{name: "large read, first byte", load: sr1mQ4, flip: first, want: "wrong data"},
		{name: "verified, first byte", flip: first, want: "wrong data"},
		{name: "verified, in the middle", flip: middle, want: "wrong data"},
		{name: "verified, last byte", flip: last, want: "wrong data"},
		{name: "write lost", load: rw4k, lost: true, want: "wrong data"},
		{name: "write read back, in the middle", load: rw4k, flip: middle, want: "wrong data"},
	}
	for _, one := range []contender{goClient("goclient", "goclient", ours), cClient("libnbd", peer)} {
		for _, tt := range tests {
			t.Run(one.name+" "+tt.name, func(t *testing.T) {
				l := &liar{store: make([]byte, 16<<20), flip: tt.flip, loses: tt.lost}
				e, err := nbd.NewExport(l, nbd.Options{})
				if err != nil {
					t.Fatal(err)
				}
				s := &nbd.Server{Exports: map[string]*nbd.Export{"": e}}
				p, c := newClient(t, w, func(l net.Listener) { _ = s.Serve(l) }) // It ends along with the listener.
				if err := c.fill(t.Context(), p); err != nil {
					t.Fatal(err)
				}
				l.lies.Store(true)
				if tt.load.depth > 0 {
					var got sample
					got, err = one.load(t.Context(), c, p, tt.load)
					if err == nil && (got.IOPS <= 0 || got.ClientUS <= 0) {
						t.Errorf("nothing was measured: %+v", got)
					}
				} else {
					err = one.verify(t.Context(), c, p)
				}
				switch {
				case tt.want == "" && err != nil:
					t.Fatal(err)
				case tt.want != "" && err == nil:
					t.Fatal("fault was not found")
				case tt.want != "" && !strings.Contains(err.Error(), tt.want):
					t.Fatalf("got %v, want %q", err, tt.want)
				}
			})
		}
	}
}

func TestGoclientCopies(t *testing.T) {
	w := withClients(t)
	const size = 16<<20 + 4096 // It does not end with a block of the copy.
	var clients [2]*process
	var stores [2]*liar
	var c client
	for i := range clients {
		stores[i] = &liar{store: make([]byte, size)}
		e, err := nbd.NewExport(stores[i], nbd.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &nbd.Server{Exports: map[string]*nbd.Export{"": e}}
		clients[i], c = newClient(t, w, func(l net.Listener) { _ = s.Serve(l) })
	}
	for i := range stores[0].store {
		stores[0].store[i] = byte(i >> 12)
	}
	for _, k := range []copying{{connections: 1}, {connections: 4}} {
		clear(stores[1].store)
		argv := goCopier("goclient", filepath.Join(w.dir, "goclient"), ours).
			command(k, []string{clients[0].at.uri(), clients[1].at.uri()})
		if _, err := c.output(t.Context(), argv...); err != nil {
			t.Fatal(err)
		}
		if string(stores[0].store) != string(stores[1].store) {
			t.Errorf("%d connections: the copy is not the same", k.connections)
		}
	}
}

func TestParseFio(t *testing.T) {
	out := []byte(`fio: connected to NBD server
{"jobs": [{"error": 0, "job_runtime": 150, "usr_cpu": 20, "sys_cpu": 40,
 "read": {"total_ios": 0},
 "write": {"total_ios": 9000, "iops": 60000, "bw_bytes": 245760000,
  "clat_ns": {"percentile": {"50.000000": 480000, "99.000000": 700000}}}}]}`)
	want := sample{IOPS: 60000, MBps: 245.76, P50: 480, P99: 700, ClientUS: 10}
	if got, err := parseFio(out, rw4k); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if got, err := parseFio(out[:60], rw4k); err == nil {
		t.Errorf("half of it is %+v", got)
	}
}
