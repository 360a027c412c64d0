package server_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// strict is a device that checks what reaches it.
type strict struct {
	size int64
	bad  atomic.Int32 // calls out of bounds, or too long for one
}

func (s *strict) check(off, n, longest int64) {
	if off < 0 || n <= 0 || n > longest || off > s.size-n || (off|n)%512 != 0 {
		s.bad.Add(1)
	}
}

func (s *strict) Size() int64 { return s.size }

func (s *strict) ReadAt(p []byte, off int64) (int, error) {
	s.check(off, int64(len(p)), 32<<20)
	return len(p), nil
}

func (s *strict) WriteAt(p []byte, off int64) (int, error) {
	s.check(off, int64(len(p)), 32<<20)
	return len(p), nil
}

func (s *strict) Trim(off, n int64) error {
	s.check(off, n, 1<<32)
	return nil
}

func (s *strict) Zero(off, n int64, flags backends.ZeroFlags) error {
	s.check(off, n, 1<<32)
	return nil
}

// FuzzTransmit sends foreign bytes to a server. Whatever they are, the backend sees only requests
// within its bounds, and when the client has gone, Transmit returns.
func FuzzTransmit(f *testing.F) {
	stream, _ := encodeScript(script())
	f.Add(stream)
	f.Add(stream[:100])
	f.Add(call{op: cmdZero, flags: noHole, offset: 512, length: 1<<32 - 512}.encode(1))
	f.Add(call{op: cmdWrite, offset: 512, length: 1 << 25, data: []byte("short")}.encode(1))
	f.Add(append(call{op: cmdDisc}.encode(0), stream...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		b := &strict{size: 1 << 33}
		ours, theirs := net.Pipe()
		conn := export(t, b, server.Options{BlockSize: 512}).NewConn(theirs, nil)
		result := make(chan error, 1)
		go func() {
			result <- conn.Transmit()
			conn.Close()
		}()
		replies := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, ours)
			replies <- err
		}()
		ours.Write(stream)
		ours.Close()
		<-replies
		<-result
		if n := b.bad.Load(); n > 0 {
			t.Errorf("%d requests out of bounds reached the backend", n)
		}
		if st := conn.Stats(); st.InFlight != 0 {
			t.Errorf("%d requests in flight at the end", st.InFlight)
		}
	})
}

// FuzzStructured is FuzzTransmit for a client that has negotiated structured replies, and what the
// server says is a stream of whole replies.
func FuzzStructured(f *testing.F) {
	stream, _ := encodeScript(script())
	f.Add(stream)
	f.Add(call{op: cmdBlockStatus, length: 1<<32 - 512}.encode(1))
	f.Add(append(call{op: cmdRead, length: 8 * page}.encode(1),
		call{op: cmdRead, flags: flagDF, length: 8 * page}.encode(2)...))
	f.Fuzz(func(t *testing.T, stream []byte) { sendForeign(t, stream, false, wholeReplies) })
}

// FuzzExtended is FuzzStructured for a client that has negotiated extended headers.
func FuzzExtended(f *testing.F) {
	read := call{op: cmdRead}.encodeExtended(1, 8*page)
	f.Add(read)
	f.Add(append(call{op: cmdWrite, flags: payloadLen, data: make([]byte, 512)}.encodeExtended(2, 512), read...))
	f.Add(append(call{op: cmdTrim, flags: payloadLen, data: make([]byte, 512)}.encodeExtended(2, 512), read...))
	f.Add(append(call{op: cmdBlockStatus}.encodeExtended(1, 1<<63), call{op: cmdFlush}.encodeExtended(3, 0)...))
	f.Add(call{op: cmdBlockStatus, flags: reqOne}.encodeExtended(1, 8*page))
	f.Fuzz(func(t *testing.T, stream []byte) {
		sendForeign(t, stream, true, func(r io.Reader) error {
			for {
				var h [32]byte
				if _, err := io.ReadFull(r, h[:]); err != nil {
					return nil
				}
				n := binary.BigEndian.Uint64(h[24:])
				if magic := binary.BigEndian.Uint32(h[:]); magic != 0x6e8a278c || n > 8*page+8 {
					return fmt.Errorf("a reply begins with %#x and has %d bytes", magic, n)
				}
				if _, err := io.CopyN(io.Discard, r, int64(n)); err != nil {
					return nil
				}
			}
		})
	})
}

// sendForeign sends foreign bytes to a server. whole reads the replies until the stream ends, and
// returns why they are none.
func sendForeign(t *testing.T, stream []byte, extended bool, whole func(io.Reader) error) {
	ours, theirs := net.Pipe()
	e := export(t, holey(), server.Options{BlockSize: 512})
	s := &server.Server{Exports: map[string]*server.Export{"x": e}}
	session, err := s.Resume(theirs, server.Agreement{
		Export: "x", Size: e.Size(), BlockSize: 512, Flags: e.Flags() | 1<<7, Structured: true, Extended: extended,
		Contexts: []server.Context{{ID: 1, Name: "base:allocation"}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() {
		result <- session.Conn().Transmit()
		session.Conn().Close()
	}()
	replies := make(chan error, 1)
	go func() {
		replies <- whole(ours)
		io.Copy(io.Discard, ours)
	}()
	ours.Write(stream)
	ours.Close()
	if err := <-replies; err != nil {
		t.Error(err)
	}
	<-result
}

// wholeReplies reads replies until the stream ends, wherever that is.
func wholeReplies(r io.Reader) error {
	for {
		var h [20]byte
		if _, err := io.ReadFull(r, h[:16]); err != nil {
			return nil
		}
		switch magic := binary.BigEndian.Uint32(h[:]); magic {
		case 0x67446698: // simple, and not to a READ
		case 0x668e33ef:
			if _, err := io.ReadFull(r, h[16:]); err != nil {
				return nil
			}
			n := binary.BigEndian.Uint32(h[16:])
			if n > 8*page+8 {
				return fmt.Errorf("a chunk of %d bytes", n)
			}
			if _, err := io.CopyN(io.Discard, r, int64(n)); err != nil {
				return nil
			}
		default:
			return fmt.Errorf("a reply begins with %#x", magic)
		}
	}
}
