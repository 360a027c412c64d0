package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	nbd "github.com/nbdctl/nbdctl/server"
)

// A faulty server answers wrongly in one way, once it has answered a number of requests rightly.
type faulty struct {
	store []byte
	after int
	fault func(*answer)
}

// An answer is what is about to be done for a request.
type answer struct {
	write  bool
	offset uint64
	store  []byte // what the request is about; a write goes here
	reply  []byte // header, and for a read the data
	twice  bool
}

func (f *faulty) Size() int64 { return int64(len(f.store)) }

func (f *faulty) ReadAt(p []byte, off int64) (int, error) { return copy(p, f.store[off:]), nil }

func (f *faulty) WriteAt(p []byte, off int64) (int, error) { return copy(f.store[off:], p), nil }

// serve serves clients one after the other.
func (f *faulty) serve(t *testing.T, l net.Listener) {
	e, err := nbd.NewExport(f, nbd.Options{})
	if err != nil {
		t.Error(err)
		return
	}
	s := &nbd.Server{Exports: map[string]*nbd.Export{"": e}}
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer nc.Close()
			if _, err := s.Handshake(nc); err != nil {
				return
			}
			err := f.transmit(nc)
			gone := errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
			if err != nil && !gone {
				t.Error(err)
			}
		}()
	}
}

func (f *faulty) transmit(nc net.Conn) error {
	in := bufio.NewReader(nc)
	var head [28]byte
	for n := 1; ; n++ {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		command := binary.BigEndian.Uint16(head[6:])
		offset := binary.BigEndian.Uint64(head[16:])
		length := binary.BigEndian.Uint32(head[24:])
		if command > 1 {
			if command == 2 {
				return nil
			}
			length = 0
		}
		a := &answer{write: command == 1, offset: offset, store: f.store[offset : offset+uint64(length)]}
		a.reply = append(binary.BigEndian.AppendUint32(nil, 0x67446698), 0, 0, 0, 0)
		a.reply = append(a.reply, head[8:16]...)
		if command == 0 {
			a.reply = append(a.reply, a.store...)
		}
		if f.fault != nil && n > f.after {
			f.fault(a)
		}
		if a.write {
			payload := make([]byte, length)
			if _, err := io.ReadFull(in, payload); err != nil {
				return err
			}
			copy(a.store, payload)
		}
		for range map[bool]int{false: 1, true: 2}[a.twice] {
			if _, err := nc.Write(a.reply); err != nil {
				return err
			}
		}
	}
}

// flip changes a byte of the data of reads.
func flip(at func(n int) int) func(*answer) {
	return func(a *answer) {
		if data := a.reply[16:]; len(data) > 0 {
			data[at(len(data))] ^= 1
		}
	}
}

// withLoadgen is a workspace that has loadgen alone.
func withLoadgen(t *testing.T) *workspace {
	t.Helper()
	w := &workspace{tree: "../..", dir: t.TempDir()}
	sources, err := filepath.Abs("load")
	if err != nil {
		t.Fatal(err)
	}
	argv := []string{
		"gcc", "-std=gnu17", "-O2", "-pthread", "-o", w.path("loadgen"),
		"loadgen.c", "loop.c", "client.c", "cpu.c", "verify.c", "-lssl", "-lcrypto",
	}
	if err := run(t.Context(), sources, argv...); err != nil {
		t.Fatal(err)
	}
	return w
}

// TestLoadgenHasCertificate holds that loadgen shows its certificate to a server that wants one, as
// nbd-server does.
func TestLoadgenHasCertificate(t *testing.T) {
	w := withLoadgen(t)
	dir := w.path("certificates")
	if err := makeCertificates(dir); err != nil {
		t.Fatal(err)
	}
	cert, key := filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem")
	own, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authority)
	f := &faulty{store: make([]byte, 16<<20)}
	e, err := nbd.NewExport(f, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &nbd.Server{
		Exports:    map[string]*nbd.Export{"": e},
		RequireTLS: true,
		TLS: &tls.Config{
			Certificates: []tls.Certificate{own},
			ClientCAs:    pool,
			ClientAuth:   tls.RequireAndVerifyClientCert,
		},
	}
	p, c := newClient(t, w, func(l net.Listener) { _ = s.Serve(l) }) // It ends along with the listener.
	p.tls = true
	if err := c.verify(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

func TestLoadgenFindsFaults(t *testing.T) {
	w := withLoadgen(t)
	first := func(int) int { return 0 }
	middle := func(n int) int { return n / 2 }
	last := func(n int) int { return n - 1 }
	lost := func(a *answer) { a.store = nil }
	tests := []struct {
		name  string
		load  load // none: verify
		fault func(*answer)
		want  string // in the error; "": none
	}{
		{"right", rr4k, nil, ""},
		{"right writes", rw4k, nil, ""},
		{"right mix, framed", load{depth: 8, block: 4 << 10, reads: 50, kernel: true}, nil, ""},
		{"right, large", sw1m, nil, ""},
		{"right, verified", load{}, nil, ""},
		{"read, first byte", rr4k, flip(first), "wrong data"},
		{"read, first byte, framed", rr4kK, flip(first), "wrong data"},
		{"large read, first byte", sr1m, flip(first), "wrong data"},
		{"verified, first byte", load{}, flip(first), "wrong data"},
		{"verified, in the middle", load{}, flip(middle), "wrong data"},
		{"verified, last byte", load{}, flip(last), "wrong data"},
		{"write lost", rw4k, lost, "which had been written"},
		{"large write lost", rw128k, lost, "which had been written"},
		{"verified, write lost", load{}, lost, "wrong data"},
		{"write read back, in the middle", rw4k, flip(middle), "which had been written"},
		{"error", rr4k, func(a *answer) {
			a.reply = append(a.reply[:0:0], a.reply[:16]...)
			a.reply[7] = 5
		}, "error 5"},
		{"magic", rr4k, func(a *answer) { a.reply[0]++ }, "magic"},
		{"cookie", rr4k, func(a *answer) { a.reply[15]++ }, "not made"},
		{"two replies", rw4k, func(a *answer) { a.twice = true }, "not made"},
		{"short", rr4k, func(a *answer) { a.reply = a.reply[:len(a.reply)-1] }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := &faulty{store: make([]byte, 16<<20), after: 4}
			p, c := newClient(t, w, func(l net.Listener) { f.serve(t, l) })
			if err := c.fill(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			f.fault = tt.fault
			var err error
			if tt.load.depth > 0 {
				_, err = c.run(t.Context(), p, tt.load)
			} else {
				_, err = c.loadgen(t.Context(), "verify", p, "-b", "131072", "-q", "4")
			}
			switch {
			case tt.fault == nil && err != nil:
				t.Fatal(err)
			case tt.fault != nil && err == nil:
				t.Fatal("fault was not found")
			case tt.fault != nil && !strings.Contains(err.Error(), tt.want):
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// newClient starts a server, and returns it with a client for it.
func newClient(t *testing.T, w *workspace, serve func(net.Listener)) (*process, client) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go serve(l)
	p := &process{at: place{network: "unix", address: l.Addr().String()}}
	return p, client{w: w, cpu: -1, space: 16 << 20, warm: 20 * time.Millisecond, timed: 40 * time.Millisecond}
}
