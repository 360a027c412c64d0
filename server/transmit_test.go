package server_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"net"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestRequests makes one request of each sort and checks what the backend was asked, what the
// client got, and what was stored.
func TestRequests(t *testing.T) {
	const size = 1 << 20
	payload := bytes.Repeat([]byte("nbd."), 1024)
	all := ^backends.Caps(0)
	tests := []struct {
		name  string
		b     func(*disk) backends.Backend
		o     server.Options
		q     call
		errno uint32
		calls []string
	}{
		{name: "read", q: call{op: cmdRead, offset: 512, length: 1024}, calls: []string{"read 512+1024"}},
		{name: "read with FUA", q: call{op: cmdRead, flags: fua, length: 1024}, calls: []string{"read 0+1024"}},
		{name: "read nothing", q: call{op: cmdRead, offset: size}},
		{name: "read all", q: call{op: cmdRead, length: size}, calls: []string{"read 0+1048576"}},
		{name: "read past the end", q: call{op: cmdRead, offset: size - 512, length: 1024}, errno: einval},
		{name: "read of 4 GiB", q: call{op: cmdRead, length: math.MaxUint32}, errno: einval},
		{name: "write", q: call{op: cmdWrite, offset: 4096, data: payload}, calls: []string{"write 4096+4096"}},
		{name: "write nothing", q: call{op: cmdWrite, offset: 4096}},
		{name: "write past the end", q: call{op: cmdWrite, offset: size, data: payload}, errno: enospc},
		{name: "write far past the end", q: call{op: cmdWrite, offset: math.MaxUint64 - 1, data: payload},
			errno: enospc},
		{name: "write FUA", q: call{op: cmdWrite, flags: fua, data: payload}, calls: []string{"write-fua 0+4096"}},
		{name: "write FUA, emulated", b: func(d *disk) backends.Backend { return plain{d, all} },
			q: call{op: cmdWrite, flags: fua, data: payload}, calls: []string{"write 0+4096", "sync 0+0"}},
		{name: "write FUA, always durable", b: func(d *disk) backends.Backend { return plain{d, backends.CapWrite} },
			q: call{op: cmdWrite, flags: fua, data: payload}, calls: []string{"write 0+4096"}},
		{name: "write to read-only", o: server.Options{ReadOnly: true}, q: call{op: cmdWrite, data: payload},
			errno: eperm},
		{name: "write of odd length", o: server.Options{BlockSize: 512}, q: call{op: cmdWrite, data: payload[:511]},
			errno: einval},
		{name: "write with an unknown flag", q: call{op: cmdWrite, flags: 1 << 9, data: payload}, errno: einval},
		{name: "write of 5 MiB past the end", q: call{op: cmdWrite, offset: size, data: make([]byte, 5<<20)},
			errno: enospc},
		{name: "flush", q: call{op: cmdFlush}, calls: []string{"sync 0+0"}},
		{name: "flush, always durable", b: func(d *disk) backends.Backend { return plain{d, backends.CapWrite} },
			q: call{op: cmdFlush}},
		{name: "flush of read-only", o: server.Options{ReadOnly: true}, q: call{op: cmdFlush},
			calls: []string{"sync 0+0"}},
		{name: "flush with a range", q: call{op: cmdFlush, length: 512}, errno: einval},
		{name: "trim", q: call{op: cmdTrim, offset: 512, length: 8192}, calls: []string{"trim 512+8192"}},
		{name: "trim with FUA", q: call{op: cmdTrim, flags: fua, length: 512},
			calls: []string{"trim 0+512", "sync 0+0"}},
		{name: "trim not offered", b: func(d *disk) backends.Backend { return plain{d, backends.CapWrite} },
			q: call{op: cmdTrim, length: 512}, errno: einval},
		{name: "trim of 4 GiB", q: call{op: cmdTrim, length: math.MaxUint32}, errno: einval},
		{name: "zero", q: call{op: cmdZero, length: size}, calls: []string{"zero 0+1048576"}},
		{name: "zero, no hole, FUA", q: call{op: cmdZero, flags: fua | noHole, length: 512},
			calls: []string{"zero-no-hole 0+512", "sync 0+0"}},
		{name: "zero, written", b: func(d *disk) backends.Backend { return plain{d, all} },
			q:     call{op: cmdZero, flags: fua, offset: 1, length: 600000},
			calls: []string{"write 1+262144", "write 262145+262144", "write 524289+75712", "sync 0+0"}},
		{name: "zero past the end", q: call{op: cmdZero, length: size + 1}, errno: enospc},
		{name: "unknown command", q: call{op: 5, length: 512}, errno: einval},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(size)
				for i := range d.data {
					d.data[i] = byte(i % 251)
				}
				want := bytes.Clone(d.data)
				var b backends.Backend = d
				if tt.b != nil {
					b = tt.b(d)
				}
				s := connect(t, export(t, b, tt.o))

				got := s.expect(tt.errno, tt.q)
				if diff := cmp.Diff(tt.calls, d.history()); diff != "" {
					t.Errorf("calls of the backend (-want +got):\n%s", diff)
				}
				if tt.errno == 0 {
					area := want[tt.q.offset:]
					switch tt.q.op {
					case cmdRead:
						if !bytes.Equal(got, area[:tt.q.length]) {
							t.Error("the data read are wrong")
						}
					case cmdWrite:
						copy(area, tt.q.data)
					case cmdTrim, cmdZero:
						clear(area[:tt.q.length])
					}
				}
				if !bytes.Equal(d.data, want) {
					t.Error("what is stored afterwards is wrong")
				}
				// Whatever that was, the connection has survived it, and is in step.
				if got := s.expect(0, call{op: cmdRead, length: 512}); !bytes.Equal(got, want[:512]) {
					t.Error("the next read gives something else")
				}
				s.disconnect()
			})
		})
	}
}

// TestZeroUnsupported has a Zeroer that finds out only when asked that it cannot.
func TestZeroUnsupported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		copy(d.data, "something")
		d.before = func(op string, off, n int64) error {
			if op == "zero" {
				return &net.OpError{Op: "fallocate", Err: errUnsupported}
			}
			return nil
		}
		s := connect(t, export(t, d, server.Options{}))
		s.expect(0, call{op: cmdZero, length: 4096})
		want := []string{"zero 0+4096", "write 0+4096"}
		if diff := cmp.Diff(want, d.history()); diff != "" {
			t.Errorf("calls of the backend (-want +got):\n%s", diff)
		}
		if !bytes.Equal(d.data, make([]byte, 8192)) {
			t.Error("not all is zero")
		}
		s.disconnect()
	})
}

// TestEnds holds what Transmit returns for each way in which a client can go.
func TestEnds(t *testing.T) {
	read := call{op: cmdRead, length: 16}.encode(1)
	tests := []struct {
		name string
		sent []byte
		want error // nil: none; errAny: some error that is none of the others
	}{
		{"at once", nil, nil},
		{"after a request", read, nil},
		{"by NBD_CMD_DISC", call{op: cmdDisc}.encode(0), nil},
		{"by NBD_CMD_DISC with more behind it", append(call{op: cmdDisc}.encode(0), read...), nil},
		{"inside a header", read[:27], io.ErrUnexpectedEOF},
		{"inside a payload", call{op: cmdWrite, length: 512, data: make([]byte, 511)}.encode(1), io.ErrUnexpectedEOF},
		{"with a wrong magic", append(read, make([]byte, 28)...), errAny},
		{"with a write too long to be drained", call{op: cmdWrite, length: 32<<20 + 1, data: []byte("x")}.encode(1),
			errAny},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs := socketpair(t)
			conn := export(t, newDisk(1024), server.Options{}).NewConn(theirs, nil)
			defer conn.Close()
			result := make(chan error, 1)
			go func() { result <- conn.Transmit() }()
			if _, err := ours.Write(tt.sent); err != nil {
				t.Fatal(err)
			}
			ours.CloseWrite()
			checkError(t, <-result, tt.want)
			conn.Close()
			replies, err := io.ReadAll(ours)
			if err != nil {
				t.Fatal(err)
			}
			wantLen := 0
			if bytes.HasPrefix(tt.sent, read) {
				wantLen = 16 + 16 // What was complete is answered, whatever came behind it.
			}
			if len(replies) != wantLen {
				t.Errorf("%d bytes of replies, want %d", len(replies), wantLen)
			}
			want := len(tt.sent) >= 28 && binary.BigEndian.Uint16(tt.sent[6:]) == cmdDisc
			if conn.Disconnected() != want {
				t.Errorf("Disconnected is %v, want %v", !want, want)
			}
		})
	}
}
