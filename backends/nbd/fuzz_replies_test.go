package nbd_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// asked are the requests that are in flight when a server of FuzzReplies begins to speak. Their
// cookies are what the client makes of the first ones: another number would be found by the seeds.
var asked = []query{
	{command: cmdRead, cookie: 0x10000, offset: 0, length: 100},
	{command: cmdRead, cookie: 0x10001, offset: 4096, length: 20000},
	{command: cmdRead, cookie: 0x10002, offset: 1 << 32, length: 1},
	{command: cmdWrite, cookie: 0x10003, offset: 512, length: 10},
	{command: cmdFlush, cookie: 0x10004},
	{command: cmdTrim, cookie: 0x10005, offset: 8192, length: 4096},
	{command: cmdStatus, cookie: 0x10006, offset: 1000, length: 1},
}

// A caller is who waits for one of them.
type caller struct {
	memory []byte // of a READ, with something around it
	marks  []backends.Mark
	is     <-chan result
}

// around is how much memory there is before and behind the data of a READ.
const around = 64

// calls makes the requests, one after the other.
func calls(t *testing.T, r *rig, nc *tape) []*caller {
	ctx, cancel := context.WithCancel(context.Background()) // One could give up, and does not.
	t.Cleanup(cancel)
	var all []*caller
	for i, q := range asked {
		w := &caller{memory: bytes.Repeat([]byte{0xee}, int(q.length)+2*around)}
		p := w.memory[around : around+q.length]
		switch {
		case i == 1:
			w.is = r.readContext(ctx, p, q.offset)
		case q.command == cmdRead:
			w.is = r.read(p, q.offset)
		case q.command == cmdWrite:
			w.is = r.write(make([]byte, q.length), q.offset)
		case q.command == cmdFlush:
			w.is = r.effect(r.c.Sync)
		case q.command == cmdTrim:
			w.is = r.effect(func() error { return r.c.Trim(q.offset, q.length) })
		case r.form == simple:
			continue // There are no contexts.
		default:
			w.is = r.effect(func() error {
				return r.c.ContextExtents("base:allocation", q.offset, q.length, func(m backends.Mark) bool {
					w.marks = append(w.marks, m)
					return true
				})
			})
		}
		select {
		case <-nc.heard:
		case got := <-w.is:
			t.Fatalf("request %d is not sent: %+v", i, got)
		}
		all = append(all, w)
	}
	return all
}

// FuzzReplies holds that no server, whatever it says to requests that are in flight, makes a client
// panic, hang, write where it must not, or tell of success without it. Which requests succeed, and
// with which data, is what another reading of the document has, too (oracle).
func FuzzReplies(f *testing.F) {
	for _, form := range forms {
		for _, says := range seeds(form) {
			f.Add(byte(form), says)
		}
	}
	f.Fuzz(func(t *testing.T, number byte, says []byte) {
		form := form(number % 3)
		nc := newTape(says)
		r := newRig(t, form, nc, nc, nbd.Options{MaxInFlight: 8})
		all := calls(t, r, nc)
		close(nc.begin)
		o := newOracle(form, says)
		o.read()
		late := time.After(20 * time.Second)
		for i, w := range all {
			var got result
			select {
			case got = <-w.is:
			case <-late:
				t.Fatalf("request %d hangs", i)
			}
			checkMemory(t, i, w)
			if !o.vague() {
				checkOracle(t, i, w, got, o.verdicts[asked[i].cookie])
			}
		}
		inTime(t, "Close", func() { r.c.Close() })
	})
}

// checkMemory fails the test if memory was written to that is not for data of the server.
func checkMemory(t *testing.T, i int, w *caller) {
	t.Helper()
	n := len(w.memory)
	if bytes.Count(w.memory[:around], []byte{0xee})+bytes.Count(w.memory[n-around:], []byte{0xee}) != 2*around {
		t.Errorf("request %d: what is around its memory was written to", i)
	}
	if p := w.memory[around : n-around]; asked[i].command != cmdRead && bytes.Count(p, []byte{0xee}) != len(p) {
		t.Errorf("request %d has data", i)
	}
}

// checkOracle compares what a caller got with what it was to get.
func checkOracle(t *testing.T, i int, w *caller, got result, want *verdict) {
	t.Helper()
	q := asked[i]
	if (got.err == nil) != (want.answered && !want.failed) {
		t.Errorf("request %d: %d, %v, and the oracle has %v, %v", i, got.n, got.err, want.answered, want.failed)
	}
	if got.err != nil {
		return
	}
	if q.command == cmdRead {
		if got.n != int(q.length) {
			t.Errorf("request %d: %d bytes", i, got.n)
		}
		for at, b := range w.memory[around : around+q.length] {
			if !want.got[at] || b != want.data[at] {
				t.Fatalf("request %d: byte %d is %#x, and the oracle has %#x (%v)", i, at, b, want.data[at],
					want.got[at])
			}
		}
	}
	if q.command == cmdStatus {
		if m := w.marks; len(m) != 1 || m[0].Offset != q.offset || m[0].Length != q.length || m[0].Flags != want.flags {
			t.Errorf("request %d: extents %+v, and the oracle has flags %#x", i, m, want.flags)
		}
	}
}

// seeds are dialogues of a form: good ones, and some that are wrong in one way each.
func seeds(f form) [][]byte {
	r := &rig{form: f}
	var good []byte
	for _, q := range asked {
		switch {
		case q.command == cmdStatus && f == simple:
		case q.command == cmdStatus:
			good = cat(good, r.status(q, 0, dirtyID, 1, 5), r.status(q, done, allocationID, 1, 3, 5, 0))
		case q.command == cmdRead:
			good = cat(good, r.filled(q, pattern(q.offset, int(q.length))))
		default:
			good = cat(good, r.ok(q))
		}
	}
	all := [][]byte{nil, good, good[:len(good)-1], good[:50], cat(good, r.ok(asked[3])),
		cat(r.ok(asked[3]), r.ok(asked[3]))}
	for _, q := range asked[:6] {
		all = append(all, r.failed(q, 5, "no"), r.filled(q, pattern(0, int(q.length))))
	}
	if f == simple {
		return all
	}
	q, s := asked[0], asked[6]
	data := func(flags u16, from, to int64) []byte {
		return r.chunk(q, flags, chunkData, u64(from), pattern(from, int(to-from)))
	}
	hole := func(flags u16, from, to int64) []byte {
		return r.chunk(q, flags, chunkHole, u64(from), u32(to-from))
	}
	return append(all,
		cat(data(0, 50, 100), data(0, 0, 50), r.chunk(q, done, chunkNone)),
		cat(hole(0, 99, 100), data(0, 0, 1), r.ok(asked[4]), hole(0, 1, 50), data(done, 50, 99)),
		cat(data(0, 0, 50), data(done, 51, 100)),
		cat(data(0, 0, 51), hole(done, 50, 100)),
		cat(data(0, 0, 50), r.chunk(q, 0, chunkErrorOffset, u32(5), u16(2), "no", u64(50)), hole(done, 60, 100)),
		cat(data(0, 0, 100), r.chunk(q, done, 0x8003, u32(5), u16(0), "more")),
		cat(data(0, 0, 100), r.chunk(q, done, chunkNone, "x")),
		r.chunk(q, done, chunkData, u64(0)), r.chunk(q, done, chunkError, u32(0), u16(0)),
		cat(r.chunk(q, done, 3), data(done, 0, 100)),
		asked[0].simple(0, pattern(0, 100)), asked[6].simple(0), asked[6].simple(22), asked[4].simple(0),
		cat(r.status(s, 0, allocationID, 1, 1), r.status(s, done, allocationID, 1, 1)),
		r.status(s, done, dirtyID, 1, 1), r.status(s, done, allocationID, 0, 1), r.status(s, done, 8, 1, 1),
		r.status(s, done, allocationID), r.status(s, done, allocationID, 1<<32-1, 1<<32-1, 1<<32-1, 1),
		r.header(q, done, chunkData, 1<<32-1), r.header(s, done, chunkStatus, 1<<32-4),
		r.header(s, done, chunkStatusExt, 1<<32-8),
		r.chunk(s, done, chunkStatusExt, allocationID, u32(0), u64(1<<63), u64(1<<63)),
	)
}
