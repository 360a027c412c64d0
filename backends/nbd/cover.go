package nbd

import "slices"

// maxPieces bounds the pieces that a cover has at once. Servers send the chunks of a reply in any
// order, and in practice in ascending order, or nearly so.
const maxPieces = 1 << 10

// A cover is a set of bytes of one reply, from 0 to its length: those that have come. The zero
// value is empty.
type cover struct {
	n      uint64   // of bytes in it
	pieces []extent // in ascending order, none of which touches the next
}

type extent struct{ from, to uint64 }

// reset empties it, and keeps its memory.
func (c *cover) reset() { c.n, c.pieces = 0, c.pieces[:0] }

// add puts in [from, to). It reports whether none of it was there already, and there was room.
func (c *cover) add(from, to uint64) bool {
	i := len(c.pieces)
	if i > 0 && from < c.pieces[i-1].to { // Not behind all others.
		i, _ = slices.BinarySearchFunc(c.pieces, from, func(e extent, from uint64) int {
			if e.to <= from {
				return -1
			}
			return 1
		})
	}
	// All before i end at from or before, and i ends behind it.
	if i < len(c.pieces) && c.pieces[i].from < to {
		return false
	}
	c.n += to - from
	before := i > 0 && c.pieces[i-1].to == from
	after := i < len(c.pieces) && c.pieces[i].from == to
	switch {
	case before && after:
		c.pieces[i-1].to = c.pieces[i].to
		c.pieces = slices.Delete(c.pieces, i, i+1)
	case before:
		c.pieces[i-1].to = to
	case after:
		c.pieces[i].from = from
	case len(c.pieces) == maxPieces:
		return false
	default:
		c.pieces = slices.Insert(c.pieces, i, extent{from, to})
	}
	return true
}
