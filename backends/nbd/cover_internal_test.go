package nbd

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// A bitmap is a set of bytes as one would have it without a thought of its size.
type bitmap []bool

// add is what cover.add is to be, if there is room.
func (b bitmap) add(from, to uint64) bool {
	if slices.Contains(b[from:to], true) {
		return false
	}
	for i := from; i < to; i++ {
		b[i] = true
	}
	return true
}

// pieces are the runs of bytes that are there.
func (b bitmap) pieces() (all []extent) {
	for i := range b {
		if !b[i] {
			continue
		}
		if at := uint64(i); len(all) > 0 && all[len(all)-1].to == at {
			all[len(all)-1].to++
		} else {
			all = append(all, extent{at, at + 1})
		}
	}
	return all
}

// TestCover holds that a cover is what a bitmap is, whatever comes in whatever order.
func TestCover(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 1))
	var c cover
	for round := range 3000 {
		total := uint64(1 + random.IntN(1+round%200))
		longest := 1 + random.Uint64N(total)
		b := make(bitmap, total)
		c.reset()
		for range 60 {
			from := random.Uint64N(total)
			to := min(from+1+random.Uint64N(longest), total)
			was := slices.Clone(c.pieces)
			want := b.add(from, to)
			if got := c.add(from, to); got != want {
				t.Fatalf("add(%d, %d) to %v is %v", from, to, was, got)
			}
			pieces := b.pieces()
			n := uint64(0)
			for _, e := range pieces {
				n += e.to - e.from
			}
			if !slices.Equal(c.pieces, pieces) || c.n != n {
				t.Fatalf("add(%d, %d) to %v makes %d bytes, %v; want %d, %v", from, to, was, c.n, c.pieces, n, pieces)
			}
		}
	}
}

// TestCoverRoom holds that a cover takes no more memory than for its pieces, and that it takes what
// joins others also when it is full.
func TestCoverRoom(t *testing.T) {
	var c cover
	for i := range uint64(maxPieces) {
		if !c.add(4*i+1, 4*i+2) {
			t.Fatalf("there is no room for piece %d", i)
		}
	}
	for _, from := range []uint64{4*maxPieces + 1, 1 << 60, 3} {
		if was := slices.Clone(c.pieces); c.add(from, from+1) || !slices.Equal(c.pieces, was) {
			t.Errorf("there is room for one more at %d", from)
		}
	}
	for _, e := range []extent{{2, 3}, {4, 5}, {3, 4}, {4*maxPieces - 2, 1 << 60}} { // behind, before, between
		if !c.add(e.from, e.to) {
			t.Errorf("there is no room for %v, which joins another", e)
		}
	}
	if len(c.pieces) != maxPieces-1 || c.pieces[0] != (extent{1, 6}) {
		t.Errorf("%d pieces, the first of them %v", len(c.pieces), c.pieces[0])
	}
	if !c.add(1<<60+1, 1<<60+2) {
		t.Error("there is no room, and one piece less")
	}
	kept := cap(c.pieces)
	if c.reset(); c.n != 0 || len(c.pieces) != 0 || cap(c.pieces) != kept || !c.add(1, 2) {
		t.Errorf("after a reset: %+v", c)
	}
}
