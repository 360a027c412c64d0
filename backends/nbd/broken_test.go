package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// reply is a good one to a request, in pieces where there can be some.
func (r *rig) reply(q query) []byte {
	switch {
	case q.command == cmdStatus:
		return cat(r.status(q, 0, dirtyID, 5, 5, 995, 0), r.status(q, done, allocationID, 1000, 3))
	case q.command != cmdRead:
		return r.ok(q)
	case r.form == simple:
		return r.filled(q, pattern(q.offset, int(q.length)))
	}
	data := pattern(q.offset, int(q.length))
	return cat(r.chunk(q, 0, chunkData, u64(q.offset+900), data[900:]),
		r.chunk(q, 0, chunkHole, u64(q.offset), u32(880)),
		r.chunk(q, 0, chunkData, u64(q.offset+880), data[880:900]), r.chunk(q, done, chunkNone))
}

// TestReplyCut holds that nobody hangs, and nobody gets what is not there, when a connection breaks
// at any byte of a reply.
func TestReplyCut(t *testing.T) {
	for _, f := range forms {
		for _, command := range []u16{cmdRead, cmdWrite, cmdStatus} {
			if command == cmdStatus && f == simple {
				continue
			}
			t.Run(fmt.Sprintf("%v, command %d", f, command), func(t *testing.T) {
				length := 1
				for n := 0; n < length; n++ {
					bubble(t, f, func(t *testing.T, r *rig) {
						length = checkReplyCut(t, r, command, n)
					})
				}
			})
		}
	}
}

// checkReplyCut has three callers wait when the connection breaks in the reply to the first one. It
// returns the length of that.
func checkReplyCut(t *testing.T, r *rig, command u16, n int) int {
	is := r.makes(command)
	q := r.next()
	p := bytes.Repeat([]byte{0xee}, 200)
	read := r.read(p, 0)
	r.next()
	written := r.write(make([]byte, 20<<10), 1<<20)
	r.next()
	reply := r.reply(q)
	r.say(reply[:n])
	r.nc.Close()
	for _, is := range []<-chan result{is, read, written} {
		if got := <-is; !errors.Is(got.err, io.ErrUnexpectedEOF) || got.n != 0 ||
			errors.As(got.err, new(*nbd.RequestError)) {
			t.Errorf("after %d bytes: %d, %v", n, got.n, got.err)
		}
	}
	if bytes.Count(p, []byte{0xee}) != len(p) {
		t.Errorf("after %d bytes: the data of another request were written to", n)
	}
	if _, err := r.c.WriteAt(p, 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("later: %v", err)
	}
	if err := r.c.Close(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Close: %v", err)
	}
	return len(reply)
}

// TestErrorCut holds that an error is told also of a request that got nothing else, since it counts
// whatever comes behind it.
func TestErrorCut(t *testing.T) {
	each(t, chunked, func(t *testing.T, r *rig) {
		is := r.makes(cmdRead)
		r.say(r.chunk(r.next(), 0, chunkError, u32(28), u16(2), "no"))
		r.nc.Close()
		if got := <-is; got.n != 0 || !errors.Is(got.err, syscall.ENOSPC) {
			t.Errorf("%d, %v", got.n, got.err)
		}
		if _, err := r.c.ReadAt(make([]byte, 1), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("later: %v", err)
		}
	})
}

// TestSocketCut is TestReplyCut for sockets, which have other errors, and with callers who send.
func TestSocketCut(t *testing.T) {
	for _, f := range forms {
		for n := range 25 {
			client, server := socketpair(t)
			r := newRig(t, f, client, server, nbd.Options{})
			var all []<-chan result
			for i := range 10 {
				all = append(all, r.read(make([]byte, 100<<10), int64(i)), r.write(make([]byte, 100<<10), int64(i)))
			}
			for {
				if q := r.next(); q.command == cmdRead {
					reply := r.reply(query{cookie: q.cookie, offset: q.offset, length: 1000})
					r.say(reply[:min(n*n, len(reply)-1)])
					break
				}
			}
			r.nc.Close() // What callers send goes nowhere, and what was not read is thrown away.
			for _, is := range all {
				got := <-is
				cutOff := false
				for _, e := range []error{io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
					cutOff = cutOff || errors.Is(got.err, e)
				}
				if !cutOff {
					t.Errorf("%d, %v", got.n, got.err)
				}
			}
		}
	}
}
