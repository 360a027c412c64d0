package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// status is a chunk of extents: lengths and flags in turn, which are cut to 32 bits where those of
// the form have no more.
func (r *rig) status(q query, flags u16, id u32, extents ...u64) []byte {
	if r.form == extended {
		return r.chunk(q, flags, chunkStatusExt, id, u32(len(extents)/2), numbers(r.form, extents))
	}
	return r.chunk(q, flags, chunkStatus, id, numbers(r.form, extents))
}

func numbers(f form, all []u64) []byte {
	var b []byte
	for _, n := range all {
		if f == extended {
			b = append(b, cat(n)...)
		} else {
			b = append(b, cat(u32(n))...)
		}
	}
	return b
}

// TestWrongStatus holds that a connection ends on which the answer to a BLOCK_STATUS is none.
func TestWrongStatus(t *testing.T) {
	const nothing, size = "has no extents", "tells of extents in"
	const stranger, count = "not agreed on or came before", "and has"
	just := func(payload ...any) func(*rig, query) []byte {
		return func(r *rig, q query) []byte {
			if r.form == extended {
				return r.chunk(q, done, chunkStatusExt, payload...)
			}
			return r.chunk(q, done, chunkStatus, payload...)
		}
	}
	head := func(length u64) func(*rig, query) []byte {
		return func(r *rig, q query) []byte {
			if r.form == extended {
				return r.header(q, done, chunkStatusExt, length)
			}
			return r.header(q, done, chunkStatus, length)
		}
	}
	of := func(id u32, extents ...u64) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.status(q, done, id, extents...) }
	}
	one, other := []form{structured}, []form{extended}
	checkReplies(t, []wrongReply{
		{"nothing", chunked, cmdStatus, func(r *rig, q query) []byte { return r.chunk(q, done, chunkNone) }, nothing},
		{"of another context", chunked, cmdStatus, of(dirtyID, 1000, 0), nothing},
		{"of no context", chunked, cmdStatus, of(allocationID+1, 1000, 0), stranger},
		{"of context 0", chunked, cmdStatus, of(0, 1000, 0), stranger},
		{"of a context twice", chunked, cmdStatus, func(r *rig, q query) []byte {
			return cat(r.status(q, 0, allocationID, 500, 0), r.status(q, done, allocationID, 500, 1))
		}, stranger},
		{"of another context twice", chunked, cmdStatus, func(r *rig, q query) []byte {
			return cat(r.status(q, 0, dirtyID, 500, 0), r.status(q, 0, allocationID, 500, 1),
				r.status(q, done, dirtyID, 500, 1))
		}, stranger},
		{"an extent of no length", chunked, cmdStatus, of(allocationID, 0, 0), "no bytes"},
		{"one of no length behind another", chunked, cmdStatus, of(allocationID, 500, 0, 0, 1, 500, 1), "no bytes"},
		{"an empty payload", chunked, cmdStatus, just(), size},
		{"three bytes", chunked, cmdStatus, just("\x00\x00\x00"), size},
		{"4 GiB", chunked, cmdStatus, head(0xffffffff), size},
		{"above 32 MiB", one, cmdStatus, head(32<<20 + 4), size},
		{"above 32 MiB", other, cmdStatus, head(32<<20 + 8), size},
		{"2⁶³ bytes", other, cmdStatus, head(1<<63 + 8), size},
		{"no extents", one, cmdStatus, just(allocationID), size},
		{"half an extent", one, cmdStatus, just(allocationID, u32(1000)), size},
		{"a byte too little", one, cmdStatus, just(allocationID, u32(1000), "\x00\x00\x00"), size},
		{"a byte too much", one, cmdStatus, just(allocationID, u32(1000), u32(0), "\x00"), size},
		{"an extent and a half", one, cmdStatus, just(allocationID, u32(1000), u32(0), u32(1000)), size},
		{"no extents", other, cmdStatus, just(allocationID, u32(0)), size},
		{"half an extent", other, cmdStatus, just(allocationID, u32(1), u64(1000)), size},
		{"a byte too little", other, cmdStatus, just(allocationID, u32(1), u64(1000), make([]byte, 7)), size},
		{"a byte too much", other, cmdStatus, just(allocationID, u32(1), u64(1000), u64(0), "\x00"), size},
		{"an extent and a half", other, cmdStatus, just(allocationID, u32(1), u64(1000), u64(0), u64(1000)), size},
		{"fewer than it says", other, cmdStatus, just(allocationID, u32(2), u64(1000), u64(0)), count},
		{"more than it says", other, cmdStatus, just(allocationID, u32(1), u64(500), u64(0), u64(500), u64(1)), count},
		{"far fewer than it says", other, cmdStatus, just(allocationID, u32(0xffffffff), u64(1000), u64(0)), count},
		{"as many, modulo 2³²", other, cmdStatus, just(allocationID, u32(1<<28+1), u64(1000), u64(0)), count},
	})
}

// A statusTurn is one BLOCK_STATUS of a call, and its answer.
type statusTurn struct {
	off, n  int64
	extents []u64 // lengths and flags
}

// checkStatus has a call ask for a range of a context, and returns what it yields.
func checkStatus(t *testing.T, r *rig, name string, off, n int64, turns []statusTurn) []backends.Mark {
	t.Helper()
	id, other := allocationID, dirtyID
	if name == dirty {
		id, other = other, id
	}
	var got []backends.Mark
	is := r.effect(func() error {
		return r.c.ContextExtents(name, off, n, func(m backends.Mark) bool {
			got = append(got, m)
			return true
		})
	})
	for i, turn := range turns {
		q := r.next()
		if q.command != cmdStatus || q.flags != 0 || q.offset != turn.off || q.length != turn.n {
			t.Fatalf("request %d is %+v, want %+v", i, q, turn)
		}
		if i%2 == 0 { // What the other context says is passed over, wherever it comes.
			r.say(r.status(q, 0, other, 1, 77, 1<<31, 0, 5, 5), r.status(q, done, id, turn.extents...))
		} else {
			r.say(r.status(q, 0, id, turn.extents...), r.status(q, done, other, 1<<31, 77))
		}
	}
	if err := (<-is).err; err != nil {
		t.Error(err)
	}
	r.works()
	return got
}

// TestStatus holds what a call makes of extents: each once, cut to the range, and, where the server
// tells less than was asked, it asks for the rest.
func TestStatus(t *testing.T) {
	tests := []struct {
		name   string
		forms  []form
		off, n int64
		turns  []statusTurn
		want   []backends.Mark
	}{
		{"nothing is asked", chunked, 5, 0, nil, nil},
		{"all in one", chunked, 4096, 1000, []statusTurn{{4096, 1000, []u64{1000, 3}}},
			[]backends.Mark{{Offset: 4096, Length: 1000, Flags: 3}}},
		{"two", chunked, 4096, 1000, []statusTurn{{4096, 1000, []u64{1, 3, 999, 3}}},
			[]backends.Mark{{Offset: 4096, Length: 1, Flags: 3}, {Offset: 4097, Length: 999, Flags: 3}}},
		{"a byte too much", chunked, 4096, 1000, []statusTurn{{4096, 1000, []u64{1001, 3}}},
			[]backends.Mark{{Offset: 4096, Length: 1000, Flags: 3}}},
		{"a whole extent too much", chunked, 0, 1000, []statusTurn{{0, 1000, []u64{1000, 3, 1, 1, 1 << 31, 0}}},
			[]backends.Mark{{Offset: 0, Length: 1000, Flags: 3}}},
		{"2³²-1 bytes", chunked, 4096, 1000, []statusTurn{{4096, 1000, []u64{0xffffffff, 0xffffffff}}},
			[]backends.Mark{{Offset: 4096, Length: 1000, Flags: 0xffffffff}}},
		{"a sum beyond 2³²", chunked, 4096, 1000,
			[]statusTurn{{4096, 1000, []u64{999, 1, 0xffffffff, 2, 0xffffffff, 3}}},
			[]backends.Mark{{Offset: 4096, Length: 999, Flags: 1}, {Offset: 5095, Length: 1, Flags: 2}}},
		{"the end of the export", chunked, rigSize - 10, 10, []statusTurn{{rigSize - 10, 10, []u64{0xffffffff, 1}}},
			[]backends.Mark{{Offset: rigSize - 10, Length: 10, Flags: 1}}},
		{"2⁶⁴-1 bytes", []form{extended}, 4096, 1000, []statusTurn{{4096, 1000, []u64{1<<64 - 1, 1<<64 - 1}}},
			[]backends.Mark{{Offset: 4096, Length: 1000, Flags: 1<<64 - 1}}},
		{"2⁶³ bytes", []form{extended}, 4096, 1000, []statusTurn{{4096, 1000, []u64{1, 1 << 63, 1 << 63, 1 << 32}}},
			[]backends.Mark{{Offset: 4096, Length: 1, Flags: 1 << 63}, {Offset: 4097, Length: 999, Flags: 1 << 32}}},
		{"a sum beyond 2⁶⁴", []form{extended}, 0, rigSize,
			[]statusTurn{{0, rigSize, []u64{999, 1, 1<<63 - 1, 2, 1<<63 - 1, 3}}},
			[]backends.Mark{{Offset: 0, Length: 999, Flags: 1}, {Offset: 999, Length: rigSize - 999, Flags: 2}}},
		{"less than was asked", chunked, 10, 1000,
			[]statusTurn{{10, 1000, []u64{1, 3}}, {11, 999, []u64{2, 0, 996, 1}}, {1009, 1, []u64{5, 2}}},
			[]backends.Mark{{Offset: 10, Length: 1, Flags: 3}, {Offset: 11, Length: 2},
				{Offset: 13, Length: 996, Flags: 1}, {Offset: 1009, Length: 1, Flags: 2}}},
		// What the server tells beyond the request counts, as it is in the range of the call.
		{"more than a request can ask for", []form{structured}, 512, 1<<32 + 1000, []statusTurn{
			{512, 1<<32 - 4096, []u64{1<<32 - 1, 1}}, {512 + 1<<32 - 1, 1001, []u64{5096, 2}}},
			[]backends.Mark{{Offset: 512, Length: 1<<32 - 1, Flags: 1},
				{Offset: 512 + 1<<32 - 1, Length: 1001, Flags: 2}}},
	}
	for _, tt := range tests {
		for _, name := range []string{"base:allocation", dirty} {
			t.Run(tt.name+", "+name, func(t *testing.T) {
				each(t, tt.forms, func(t *testing.T, r *rig) {
					got := checkStatus(t, r, name, tt.off, tt.n, tt.turns)
					if diff := cmp.Diff(tt.want, got); diff != "" {
						t.Errorf("-want +got:\n%s", diff)
					}
				})
			})
		}
	}
}

// TestManyExtents holds that a reply of more extents than are kept is one all the same, and that
// the rest is asked for.
func TestManyExtents(t *testing.T) {
	each(t, chunked, func(t *testing.T, r *rig) {
		const n, kept = 70000, 65536
		var all []u64
		for i := range n {
			all = append(all, u64(1+i%3), u64(i))
		}
		total := int64(0)
		for i := range n {
			total += int64(1 + i%3)
		}
		behind := total
		for i := kept; i < n; i++ {
			behind -= int64(1 + i%3)
		}
		got := checkStatus(t, r, dirty, 1000, total, []statusTurn{
			{1000, total, all}, {1000 + behind, total - behind, all[2*kept:]},
		})
		at := int64(1000)
		for i, m := range got {
			if want := (backends.Mark{Offset: at, Length: int64(1 + i%3), Flags: uint64(i)}); m != want {
				t.Fatalf("extent %d is %+v, want %+v", i, m, want)
			}
			at += m.Length
		}
		if len(got) != n {
			t.Errorf("%d extents, want %d", len(got), n)
		}
	})
}

// TestExtents holds what the flags of base:allocation mean, and that nobody is asked for more when
// the caller has enough.
func TestExtents(t *testing.T) {
	each(t, chunked, func(t *testing.T, r *rig) {
		var got []backends.Extent
		is := r.effect(func() error {
			return r.c.Extents(0, 1<<20, func(e backends.Extent) bool {
				got = append(got, e)
				return len(got) < 5
			})
		})
		q := r.next()
		r.say(r.status(q, done, allocationID, 1, 0, 2, 1, 3, 2, 4, 3, 5, 0xfffffffd, 6, 0))
		if err := (<-is).err; err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]backends.Extent{
			{Offset: 0, Length: 1}, {Offset: 1, Length: 2, Hole: true}, {Offset: 3, Length: 3, Zero: true},
			{Offset: 6, Length: 4, Hole: true, Zero: true}, {Offset: 10, Length: 5, Hole: true},
		}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		r.works()
	})
}

// TestExtentsOfBlocks holds that a server is asked in blocks of its size, and what is yielded is in
// the range of the caller, also where numbers end.
func TestExtentsOfBlocks(t *testing.T) {
	for _, tt := range []struct {
		size, off, n, at, asked int64
	}{
		{rigSize, 512, 512, 512, 512},
		{rigSize, 700, 100, 512, 512},
		{rigSize, 1, 1023, 0, 1024},
		{rigSize, 511, 2, 0, 1024},
		{rigSize, rigSize - 1, 1, rigSize - 512, 512},
		{math.MaxInt64 - 511, math.MaxInt64 - 611, 100, math.MaxInt64 - 1023, 512},
		{math.MaxInt64, math.MaxInt64 - 611, 100, math.MaxInt64 - 1023, 512}, // Half a block in the end is none.
		{1000, 412, 100, 0, 512},
	} {
		each(t, chunked, func(t *testing.T, r *rig) {
			got := checkStatus(t, r, dirty, tt.off, tt.n, []statusTurn{{tt.at, tt.asked, []u64{512, 9, 512, 9}}})
			var n int64
			for _, m := range got {
				if m.Offset != tt.off+n || m.Flags != 9 {
					t.Errorf("%+v of %+v", m, tt)
				}
				n += m.Length
			}
			if n != tt.n {
				t.Errorf("%d bytes of %+v", n, tt)
			}
		}, func(a *nbd.Agreement) {
			a.Size, a.BlockSizes = tt.size, wire.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 1 << 20}
		})
	}
}

// TestExtentsRefused holds that what a server does not have is not asked for.
func TestExtentsRefused(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		yield := func(backends.Mark) bool { t.Error("there is an extent"); return true }
		checkIs(t, r.c.ContextExtents("x:unknown", 0, 512, yield), errors.ErrUnsupported)
		checkIs(t, r.c.ContextExtents("", 0, 512, yield), errors.ErrUnsupported)
		for _, tt := range [][2]int64{{-1, 1}, {0, -1}, {rigSize, 1}, {1, rigSize}, {math.MaxInt64, math.MaxInt64},
			{math.MinInt64, 1}} {
			checkIs(t, r.c.ContextExtents(dirty, tt[0], tt[1], yield), syscall.EINVAL)
		}
		if r.form == simple {
			checkIs(t, r.c.Extents(0, 512, func(backends.Extent) bool { return true }), errors.ErrUnsupported)
		}
		r.works()
	})
}

// TestInterleavedStatus holds that the chunks of several answers may come in any order.
func TestInterleavedStatus(t *testing.T) {
	each(t, chunked, func(t *testing.T, r *rig) {
		const n = 5
		var all [n]<-chan result
		var got [n]string
		var asked [n]query
		for i := range n {
			all[i] = r.effect(func() error {
				return r.c.ContextExtents(dirty, int64(i)*1000, 1000, func(m backends.Mark) bool {
					got[i] += fmt.Sprint(m, " ")
					return true
				})
			})
			asked[i] = r.next()
		}
		p := make([]byte, 2000)
		is := r.read(p, 0)
		q := r.next()
		for i := range n {
			r.say(r.status(asked[n-1-i], 0, dirtyID, u64(n-i), u64(n-i), 1000, 0))
			r.say(r.chunk(q, 0, chunkData, u64(i*400), pattern(int64(i*400), 400)))
		}
		for i := range n {
			r.say(r.status(asked[i], done, allocationID, 1000, u64(i)))
		}
		r.say(r.chunk(q, done, chunkNone))
		for i := range n {
			want := fmt.Sprint(backends.Mark{Offset: int64(i) * 1000, Length: int64(i + 1), Flags: uint64(i + 1)}, " ",
				backends.Mark{Offset: int64(i)*1000 + int64(i+1), Length: int64(999 - i)}, " ")
			if err := (<-all[i]).err; err != nil || got[i] != want {
				t.Errorf("%d: %v, %s, want %s", i, err, got[i], want)
			}
		}
		if got := <-is; got.err != nil || !bytes.Equal(p, pattern(0, 2000)) {
			t.Errorf("%v, %s", got.err, firstDifference(p, pattern(0, 2000)))
		}
	})
}
