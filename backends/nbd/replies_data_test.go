package nbd_test

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestWrongPieces holds that a READ has each of its bytes once, and none that is not its own.
func TestWrongPieces(t *testing.T) {
	const off, n = wrongOffset, wrongLength
	const outside, twice = "is not in the request", "comes twice"
	// A piece is data from its first byte to its last, or a hole.
	data := func(at u64, length int) func(r *rig, q query, flags u16) []byte {
		return func(r *rig, q query, flags u16) []byte { return r.chunk(q, flags, chunkData, at, make([]byte, length)) }
	}
	hole := func(at u64, length u32) func(r *rig, q query, flags u16) []byte {
		return func(r *rig, q query, flags u16) []byte { return r.chunk(q, flags, chunkHole, at, length) }
	}
	nothing := func(r *rig, q query, flags u16) []byte { return r.chunk(q, flags, chunkNone) }
	in := func(pieces ...func(r *rig, q query, flags u16) []byte) func(*rig, query) []byte {
		return func(r *rig, q query) []byte {
			var b []byte
			for i, p := range pieces {
				flags := u16(0)
				if i == len(pieces)-1 {
					flags = done
				}
				b = cat(b, p(r, q, flags))
			}
			return b
		}
	}
	sized := func(kind u16, payload ...any) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return r.chunk(q, done, kind, payload...) }
	}
	head := func(kind u16, length u64, payload ...any) func(*rig, query) []byte {
		return func(r *rig, q query) []byte { return cat(r.header(q, done, kind, length), cat(payload...)) }
	}
	checkReplies(t, []wrongReply{
		{"before the range", chunked, cmdRead, in(data(off-1, n)), outside},
		{"a byte before the range", chunked, cmdRead, in(data(off-1, 1)), outside},
		{"behind the range", chunked, cmdRead, in(data(off+n, 1)), outside},
		{"beyond the range", chunked, cmdRead, in(data(off, n+1)), outside},
		{"beyond the range, in the end", chunked, cmdRead, in(data(off+n-1, 2)), outside},
		{"at the beginning of the export", chunked, cmdRead, in(data(0, n)), outside},
		{"at the end of numbers", chunked, cmdRead, in(data(1<<64-1, n)), outside},
		{"with an offset in the request", chunked, cmdRead, in(data(1, 1)), outside},
		{"a hole before the range", chunked, cmdRead, in(hole(off-1, n)), outside},
		{"a hole beyond the range", chunked, cmdRead, in(hole(off, n+1)), outside},
		{"a hole of 4 GiB", chunked, cmdRead, in(hole(off, 0xffffffff)), outside},
		{"a hole around numbers", chunked, cmdRead, in(hole(1<<64-1, n)), outside},
		{"a hole of nothing", chunked, cmdRead, in(hole(off, 0)), outside},
		{"a hole of nothing behind the range", chunked, cmdRead, in(hole(off+n, 0)), outside},
		{"no data", chunked, cmdRead, sized(chunkData, u64(off)), "no data"},
		{"no offset", chunked, cmdRead, sized(chunkData, "\x00\x00\x00\x00\x00\x00\x00"), "no data"},
		{"nothing at all", chunked, cmdRead, sized(chunkData), "no data"},
		{"a hole without a length", chunked, cmdRead, sized(chunkHole, u64(off)), "a hole in 8 bytes"},
		{"a hole of 11 bytes", chunked, cmdRead, sized(chunkHole, u64(off), "\x00\x00\x01"), "a hole in 11 bytes"},
		{"a hole of 64 bits", chunked, cmdRead, sized(chunkHole, u64(off), u64(n)), "a hole in 16 bytes"},
		{"a hole of much", chunked, cmdRead, head(chunkHole, 0xffffffff), "a hole in 4294967295 bytes"},
		{"data of 4 GiB", chunked, cmdRead, head(chunkData, 0xffffffff, u64(off)), outside},
		{"data of 2⁶³ bytes", []form{extended}, cmdRead, head(chunkData, 1<<63, u64(off)), outside},
		{"data of 2⁶⁴ bytes", []form{extended}, cmdRead, head(chunkData, 1<<64-1, u64(off)), outside},
		{"data of 2⁶⁴ bytes behind the first", []form{extended}, cmdRead, head(chunkData, 1<<64-1, u64(off+1)),
			outside},
		{"all twice", chunked, cmdRead, in(data(off, n), data(off, n)), twice},
		{"the first byte twice", chunked, cmdRead, in(data(off, n), data(off, 1)), twice},
		{"the last byte twice", chunked, cmdRead, in(data(off, n), data(off+n-1, 1)), twice},
		{"a byte in the middle twice", chunked, cmdRead, in(data(off, 500), data(off+499, 501)), twice},
		{"a byte in the middle twice, backwards", chunked, cmdRead, in(data(off+500, 500), data(off, 501)), twice},
		{"around what there is", chunked, cmdRead, in(data(off+500, 1), data(off, n)), twice},
		{"in what there is", chunked, cmdRead, in(hole(off, n), data(off+500, 1)), twice},
		{"holes twice", chunked, cmdRead, in(hole(off, n), hole(off, n)), twice},
		{"a hole over data", chunked, cmdRead, in(data(off, 500), hole(off+499, 501)), twice},
		{"between two, and a byte more", chunked, cmdRead, in(data(off, 400), data(off+600, 400), hole(off+400, 201)),
			twice},
		{"between two, and a byte before", chunked, cmdRead,
			in(data(off+600, 400), data(off, 400), hole(off+399, 201)), twice},
		{"nothing came", chunked, cmdRead, in(nothing), "has 0 bytes of 1000"},
		{"a byte is missing", chunked, cmdRead, in(data(off, n-1), nothing), "has 999 bytes of 1000"},
		{"the first byte is missing", chunked, cmdRead, in(data(off+1, n-1)), "has 999 bytes of 1000"},
		{"a byte in the middle is missing", chunked, cmdRead, in(data(off, 499), hole(off+500, 500)),
			"has 999 bytes of 1000"},
	})
	t.Run("too many pieces", func(t *testing.T) {
		each(t, chunked, func(t *testing.T, r *rig) {
			is := r.read(make([]byte, 4096), 0)
			q := r.next()
			for at := u64(0); at < 2049; at += 2 { // That is one more than there may be.
				r.say(r.chunk(q, 0, chunkData, at, "x"))
			}
			checkBroken(t, (<-is).err, "too many others")
		})
	})
}

// TestPieces holds that the pieces of a READ may come in any order and size, and that a read has
// all of it then.
func TestPieces(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	// cuts are where pieces end: n of them or less.
	cuts := func(n, total int) []int {
		at := map[int]bool{total: true}
		for range n {
			at[1+random.IntN(total)] = true
		}
		var all []int
		for i := range total + 1 {
			if at[i] {
				all = append(all, i)
			}
		}
		return all
	}
	every := func(n, total int) []int {
		var all []int
		for i := n; i < total; i += n {
			all = append(all, i)
		}
		return append(all, total)
	}
	orders := map[string]func(n int) []int{
		"forwards": func(n int) []int {
			var all []int
			for i := range n {
				all = append(all, i)
			}
			return all
		},
		"backwards": func(n int) []int {
			var all []int
			for i := range n {
				all = append(all, n-1-i)
			}
			return all
		},
		"every other one": func(n int) []int {
			var all []int
			for i := 1; i < n; i += 2 {
				all = append(all, i)
			}
			for i := 0; i < n; i += 2 {
				all = append(all, i)
			}
			return all
		},
		"at random": random.Perm,
	}
	for name, order := range orders {
		for _, total := range []int{1, 2, 1000, 100 << 10} { // The last one goes past the buffer of the client.
			for _, ends := range [][]int{{total}, cuts(2, total), cuts(1000, total), every((total+2047)/2048, total)} {
				for _, extra := range []bool{false, true} {
					if extra && total > 1000 {
						continue // It is the same as with less.
					}
					t.Run(name, func(t *testing.T) {
						each(t, chunked, func(t *testing.T, r *rig) {
							checkPieces(t, r, ends, order(len(ends)), extra)
						})
					})
				}
			}
		}
	}
}

// checkPieces has a READ be answered in pieces that end there and come in an order, every third of
// them a hole. An extra chunk may tell that it was the last one.
func checkPieces(t *testing.T, r *rig, ends, order []int, extra bool) {
	const off = 1<<33 + 77
	total := ends[len(ends)-1]
	want := pattern(off, total)
	p := bytes.Repeat([]byte{0xee}, total+200) // It has something in it, and around it.
	is := r.read(p[100:100+total], off)
	q := r.next()
	for i, piece := range order {
		from, to := 0, ends[piece]
		if piece > 0 {
			from = ends[piece-1]
		}
		flags := u16(0xfff0) // Those that nobody knows are ignored.
		if i == len(order)-1 && !extra {
			flags |= done
		}
		if piece%3 == 2 {
			clear(want[from:to])
			r.say(r.chunk(q, flags, chunkHole, u64(off)+u64(from), u32(to-from)))
		} else {
			r.say(r.chunk(q, flags, chunkData, u64(off)+u64(from), want[from:to]))
		}
	}
	if extra {
		r.say(r.chunk(q, done, chunkNone))
	}
	if got := <-is; got.err != nil || got.n != total {
		t.Fatalf("%d of %d bytes: %v", got.n, total, got.err)
	}
	if diff := firstDifference(p[100:100+total], want); diff != "" {
		t.Error(diff)
	}
	if bytes.Count(p[:100], []byte{0xee}) != 100 || bytes.Count(p[100+total:], []byte{0xee}) != 100 {
		t.Error("what is around the data was written to")
	}
	r.works()
}
