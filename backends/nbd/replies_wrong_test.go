package nbd_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// The request that gets a wrong reply.
const (
	wrongOffset = 5000
	wrongLength = 1000
)

// chunked are the forms whose replies have chunks.
var chunked = []form{structured, extended}

// makes has a caller make the request.
func (r *rig) makes(command u16) <-chan result {
	switch command {
	case cmdRead:
		return r.read(make([]byte, wrongLength), wrongOffset)
	case cmdWrite:
		return r.write(make([]byte, wrongLength), wrongOffset)
	case cmdFlush:
		return r.effect(r.c.Sync)
	case cmdTrim:
		return r.effect(func() error { return r.c.Trim(wrongOffset, wrongLength) })
	case cmdCache:
		return r.effect(func() error { return r.c.Cache(wrongOffset, wrongLength) })
	case cmdZeroes:
		return r.effect(func() error { return r.c.Zero(wrongOffset, wrongLength, 0) })
	default:
		return r.effect(func() error {
			return r.c.Extents(wrongOffset, wrongLength, func(backends.Extent) bool { return true })
		})
	}
}

// A wrongReply is one that ends the connection.
type wrongReply struct {
	name  string
	forms []form
	of    u16 // the command
	says  func(r *rig, q query) []byte
	why   string
}

// run has two requests be in flight, one of which gets the wrong reply.
func (tt wrongReply) run(t *testing.T, r *rig) {
	is := r.makes(tt.of)
	q := r.next()
	if q.command != tt.of {
		t.Fatalf("the request is %+v", q)
	}
	other := r.read(make([]byte, 10), 0)
	r.next()
	r.say(tt.says(r, q))
	for _, is := range []<-chan result{is, other} {
		got := <-is
		checkBroken(t, got.err, tt.why)
		if got.n != 0 {
			t.Errorf("%d bytes are told of", got.n)
		}
	}
	_, err := r.c.ReadAt(make([]byte, 10), 0)
	checkBroken(t, err, tt.why)
	checkBroken(t, r.c.Close(), tt.why)
}

func checkReplies(t *testing.T, tests []wrongReply) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { each(t, tt.forms, tt.run) })
	}
}

// TestWrongReply holds that a connection ends on which a reply comes that is none, or is nobody's.
func TestWrongReply(t *testing.T) {
	const step, nobody = "out of step", "not in flight"
	cookie := func(of func(u64) u64) func(r *rig, q query) []byte {
		return func(r *rig, q query) []byte {
			q.cookie = of(q.cookie)
			return r.ok(q)
		}
	}
	raw := func(b ...any) func(*rig, query) []byte { return func(*rig, query) []byte { return cat(b...) } }
	one := func(f form) []form { return []form{f} }
	checkReplies(t, []wrongReply{
		{"zeroes", forms, cmdWrite, raw(make([]byte, 32)), step},
		{"a request", forms, cmdWrite, func(r *rig, q query) []byte {
			return cat(request(r.form, 0, cmdRead, q.cookie, 0, 512), make([]byte, 4))
		}, step},
		{"text", forms, cmdWrite, raw("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n"), step},
		{"an option's", forms, cmdWrite, raw(answer(optGo, repAck), make([]byte, 12)), step},
		{"a chunk", one(simple), cmdWrite, func(r *rig, q query) []byte {
			return cat(magicStructured, done, chunkNone, q.cookie, u32(0))
		}, step},
		{"an extended chunk", one(simple), cmdWrite, func(r *rig, q query) []byte {
			return cat(magicExtended, done, chunkNone, q.cookie, u64(wrongOffset), u64(0))
		}, step},
		{"an extended chunk", one(structured), cmdWrite, func(r *rig, q query) []byte {
			return cat(magicExtended, done, chunkNone, q.cookie, u64(wrongOffset), u64(0))
		}, step},
		{"a structured chunk", one(extended), cmdWrite, func(r *rig, q query) []byte {
			return cat(magicStructured, done, chunkNone, q.cookie, u32(0), make([]byte, 12))
		}, step},
		{"a simple reply", one(extended), cmdWrite, func(r *rig, q query) []byte {
			return cat(q.simple(0), make([]byte, 16))
		}, step},
		{"a simple reply to READ", one(structured), cmdRead, func(r *rig, q query) []byte {
			return q.simple(0, make([]byte, wrongLength))
		}, "a simple reply to a request for read"},
		{"a simple reply to READ, an error", one(structured), cmdRead, func(r *rig, q query) []byte {
			return q.simple(22)
		}, "a simple reply to a request for read"},
		{"a simple reply to BLOCK_STATUS", one(structured), cmdStatus, func(r *rig, q query) []byte {
			return q.simple(0)
		}, "a simple reply to a request for block status"},
		{"another offset", one(extended), cmdWrite, func(r *rig, q query) []byte {
			q.offset++
			return r.ok(q)
		}, "has the offset 5001 instead of 5000"},
		{"the offset of a piece", one(extended), cmdRead, func(r *rig, q query) []byte {
			return cat(r.chunk(q, 0, chunkData, u64(wrongOffset), make([]byte, 500)),
				magicExtended, done, chunkData, q.cookie, u64(wrongOffset+500), u64(508),
				u64(wrongOffset+500), make([]byte, 500))
		}, "has the offset 5500 instead of 5000"},
		{"no offset", one(extended), cmdStatus, func(r *rig, q query) []byte {
			q.offset = 0
			return r.ok(q)
		}, "has the offset 0 instead of 5000"},
		{"cookie 0", forms, cmdWrite, cookie(func(u64) u64 { return 0 }), nobody},
		{"cookie of another use", forms, cmdWrite, cookie(func(c u64) u64 { return c + 1<<16 }), nobody},
		{"cookie of the use before", forms, cmdWrite, cookie(func(c u64) u64 { return c - 1<<16 }), nobody},
		{"cookie that nobody has", forms, cmdWrite, cookie(func(c u64) u64 { return c + 50 }), nobody},
		{"cookie beyond all", forms, cmdWrite, cookie(func(c u64) u64 { return c | 0xffff }), nobody},
		{"cookie of ones", forms, cmdWrite, cookie(func(u64) u64 { return 1<<64 - 1 }), nobody},
		{"cookie backwards", forms, cmdWrite, cookie(func(c u64) u64 { return c>>16 | c<<48 }), nobody},
	})
}

// TestRepliedTwice holds that a request has one reply, also when its memory is in use again.
func TestRepliedTwice(t *testing.T) {
	for _, command := range []u16{cmdRead, cmdWrite, cmdFlush, cmdTrim} {
		each(t, forms, func(t *testing.T, r *rig) {
			is := r.makes(command)
			q := r.next()
			reply := r.ok(q)
			if command == cmdRead {
				reply = r.filled(q, make([]byte, wrongLength))
			}
			r.say(reply)
			if got := <-is; got.err != nil {
				t.Fatal(got.err)
			}
			for range 200 { // Each call has been in use again then, and is free.
				r.works()
			}
			r.say(reply)
			other := r.read(make([]byte, 10), 0)
			r.receive() // It may have come too late.
			checkBroken(t, (<-other).err, "not in flight")
		})
	}
	for _, f := range chunked { // There was a last chunk, and now another comes.
		bubble(t, f, func(t *testing.T, r *rig) {
			p := make([]byte, 1000)
			is := r.read(p, 0)
			q := r.next()
			want := pattern(0, 1000)
			r.say(r.filled(q, want), r.chunk(q, 0, chunkHole, u64(0), u32(1000)))
			if got := <-is; got.err != nil || !bytes.Equal(p, want) {
				t.Errorf("%v, %s", got.err, firstDifference(p, want))
			}
			checkBroken(t, r.c.Close(), "not in flight")
			if !bytes.Equal(p, want) {
				t.Errorf("%s", firstDifference(p, want))
			}
		})
	}
}

// TestWrongChunk holds that a connection ends on which a chunk is not as it has to be.
func TestWrongChunk(t *testing.T) {
	chunk := func(flags, kind u16, payload ...any) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.chunk(q, flags, kind, payload...) }
	}
	// head is a chunk of which nothing follows.
	head := func(flags, kind u16, length u64) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.header(q, flags, kind, length) }
	}
	var tests []wrongReply
	for _, kind := range []u16{3, 4, 7, 8, 0x100, 0x7fff} {
		for _, command := range []u16{cmdRead, cmdWrite, cmdStatus} {
			tests = append(tests, wrongReply{"unknown type", chunked, command, chunk(done, kind), "a chunk of type"})
		}
	}
	for _, command := range []u16{cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdZeroes, cmdStatus} {
		tests = append(tests,
			wrongReply{"data where there are none", chunked, command, chunk(done, chunkData, u64(wrongOffset), "x"),
				"a chunk of type 1"},
			wrongReply{"a hole where there is none", chunked, command,
				chunk(done, chunkHole, u64(wrongOffset), u32(1)), "a chunk of type 2"})
	}
	for _, command := range []u16{cmdRead, cmdWrite, cmdFlush} {
		tests = append(tests,
			wrongReply{"extents where there are none", []form{structured}, command,
				chunk(done, chunkStatus, allocationID, u32(1), u32(0)), "a chunk of type 5"},
			wrongReply{"extents where there are none", []form{extended}, command,
				chunk(done, chunkStatusExt, allocationID, u32(1), u64(1), u64(0)), "a chunk of type 6"})
	}
	const empty = "an empty chunk"
	checkReplies(t, append(tests,
		wrongReply{"nothing with something", chunked, cmdWrite, chunk(done, chunkNone, "x"), empty},
		wrongReply{"nothing with 4 GiB", chunked, cmdWrite, head(done, chunkNone, 0xffffffff), empty},
		wrongReply{"nothing with 2⁶⁴ bytes", []form{extended}, cmdWrite, head(done, chunkNone, 1<<64-1), empty},
		wrongReply{"nothing, and then more", chunked, cmdWrite, chunk(0, chunkNone), empty},
		wrongReply{"extents of the other form", []form{structured}, cmdStatus,
			chunk(done, chunkStatusExt, allocationID, u32(1), u64(1), u64(0)), "a chunk of type 6"},
		wrongReply{"extents of the other form", []form{extended}, cmdStatus,
			chunk(done, chunkStatus, allocationID, u32(1), u32(0)), "a chunk of type 5"},
	))
}

// TestConnectionError holds that what has happened to a connection is told as such, and is not told
// of a request that was never sent.
func TestConnectionError(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		is := r.makes(cmdWrite)
		r.next()
		r.say("nonsense that is long enough to be a reply")
		err := (<-is).err
		checkBroken(t, err, "connection lost")
		if errors.As(err, new(*nbd.RequestError)) {
			t.Errorf("the server has refused it: %v", err)
		}
	})
}
