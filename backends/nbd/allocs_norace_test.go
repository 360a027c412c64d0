//go:build !race

package nbd_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestAllocations holds that requests take no memory of the heap, in any form. The server of this
// test does not either.
func TestAllocations(t *testing.T) {
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			client, server := socketpair(t)
			c := newRig(t, f, client, server, nbd.Options{}).c
			served := make(chan struct{})
			go func() {
				defer close(served)
				newFrugal(f, server).serve()
			}()
			small, large := make([]byte, 4<<10), make([]byte, 128<<10)
			ctx, _ := endable(t)
			extents := func(backends.Extent) bool { return true }
			for name, call := range map[string]func() error{
				"ReadAt 4k":          func() error { _, err := c.ReadAt(small, 4096); return err },
				"ReadAt 128k":        func() error { _, err := c.ReadAt(large, 4096); return err },
				"ReadAtContext 4k":   func() error { _, err := c.ReadAtContext(ctx, small, 4096); return err },
				"ReadAtContext 128k": func() error { _, err := c.ReadAtContext(ctx, large, 4096); return err },
				"WriteAt 4k":         func() error { _, err := c.WriteAt(small, 4096); return err },
				"WriteAt 128k":       func() error { _, err := c.WriteAt(large, 4096); return err },
				"WriteAtFUA 4k":      func() error { _, err := c.WriteAtFUA(small, 4096); return err },
				"Sync":               c.Sync,
				"Trim":               func() error { return c.Trim(0, 4096) },
				"Zero":               func() error { return c.Zero(0, 4096, 0) },
			} {
				if n := testing.AllocsPerRun(200, func() {
					if err := call(); err != nil {
						t.Fatal(err)
					}
				}); n != 0 {
					t.Errorf("%s: %v allocations", name, n)
				}
			}
			if f != simple {
				// A call has its own for who calls, not for what comes.
				if n := testing.AllocsPerRun(200, func() { c.Extents(0, 4096, extents) }); n > 4 {
					t.Errorf("Extents: %v allocations", n)
				}
			}
			c.Close()
			<-served
		})
	}
}

// A frugal server answers requests, and has all of its memory from the beginning.
type frugal struct {
	form    form
	nc      net.Conn
	request []byte
	reply   []byte
	payload []byte
}

func newFrugal(f form, nc net.Conn) *frugal {
	s := &frugal{form: f, nc: nc, request: make([]byte, 28), reply: make([]byte, 64+128<<10),
		payload: make([]byte, 128<<10)}
	if f == extended {
		s.request = make([]byte, 32)
	}
	return s
}

func (s *frugal) serve() {
	number := binary.BigEndian
	for {
		if _, err := io.ReadFull(s.nc, s.request); err != nil {
			return
		}
		command := u16(number.Uint16(s.request[6:]))
		n := int(number.Uint32(s.request[len(s.request)-4:]))
		if command == cmdWrite {
			if _, err := io.ReadFull(s.nc, s.payload[:n]); err != nil {
				return
			}
		}
		if s.nc.Write(s.answer(command, n)); command == cmdDisc {
			return
		}
	}
}

// answer is the reply to the request.
func (s *frugal) answer(command u16, n int) []byte {
	b := s.reply
	number := binary.BigEndian
	copy(b[8:16], s.request[8:16]) // the cookie
	if s.form == simple {
		number.PutUint32(b, uint32(magicSimple))
		if command == cmdRead {
			return b[:16+n]
		}
		return b[:16]
	}
	number.PutUint16(b[4:], uint16(done))
	payload := b[20:]
	number.PutUint32(b, uint32(magicStructured))
	if s.form == extended {
		number.PutUint32(b, uint32(magicExtended))
		copy(b[16:24], s.request[16:24]) // the offset
		payload = b[32:]
	}
	length, kind := 0, chunkNone
	switch {
	case command == cmdRead:
		kind, length = chunkData, 8+n
		copy(payload, s.request[16:24])
	case command == cmdStatus && s.form == extended:
		kind, length = chunkStatusExt, 24
		number.PutUint32(payload, uint32(allocationID))
		number.PutUint32(payload[4:], 1)
		number.PutUint64(payload[8:], uint64(n))
	case command == cmdStatus:
		kind, length = chunkStatus, 12
		number.PutUint32(payload, uint32(allocationID))
		number.PutUint32(payload[4:], uint32(n))
	}
	number.PutUint16(b[6:], uint16(kind))
	at := len(b) - len(payload)
	number.PutUint32(b[at-4:], uint32(length))
	return b[:at+length]
}
