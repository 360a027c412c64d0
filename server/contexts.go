package server

import (
	"errors"
	"slices"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// allocation is the context of what is stored. Numbers of contexts are those of the connection.
var allocation = Context{ID: 1, Name: wire.ContextAllocation}

// contextsFor returns the contexts that fit one of the queries, each once ("Metadata querying"). A
// client that lists may ask for all, or for a namespace; one that sets knows what it wants.
func contextsFor(queries []string, set bool) []Context {
	fits := func(q string) bool { return q == allocation.Name || !set && q == "base:" }
	if !set && len(queries) == 0 || slices.ContainsFunc(queries, fits) {
		return []Context{allocation}
	}
	return nil
}

// maxExtents bounds the extents in the reply to one NBD_CMD_BLOCK_STATUS. The client asks again for
// what is behind them.
const maxExtents = 4 << 10

// statusSize is the longest reply in bytes, without the header of its chunk.
const statusSize = wire.ContextIDSize + maxExtents*wire.StatusSize

// status appends what the backend has of a range, which is not empty, to b: at most max extents,
// from the beginning of the range.
func (e *Export) status(b []byte, off, n int64, max int) ([]byte, error) {
	s := statuses{b: b, block: int64(e.blockSize), at: off, end: off + n, left: max}
	if e.dev.Extenter != nil {
		err := e.dev.Extenter.Extents(off, n, s.add)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return b, err
		}
	}
	if !s.begun {
		s.extend(s.end, 0) // Nothing is known.
	}
	s.flush()
	return s.b, nil
}

// statuses makes extents of whole blocks out of pieces, which come in order and without gaps. A
// block that has any data is data.
type statuses struct {
	b     []byte
	block int64
	at    int64  // what is before it is in an extent
	end   int64  // of the range
	begun bool   // an extent, which is not in b yet
	flags uint32 // of it
	from  int64  // where it begins
	left  int    // how many may follow
}

// add adds a piece, and reports whether more are wanted.
func (s *statuses) add(e backends.Extent) bool {
	var flags uint32
	if e.Hole {
		flags |= wire.StateHole
	}
	if e.Zero {
		flags |= wire.StateZero
	}
	first, last := e.Offset, e.Offset+e.Length
	if flags == 0 {
		return s.extend(s.up(last), 0)
	}
	if first = s.up(first); first > s.at && !s.extend(first, 0) {
		return false
	}
	if last < s.end {
		last -= last % s.block
	}
	return s.extend(last, flags)
}

// up returns the end of the block in which off is, if that is not its beginning.
func (s *statuses) up(off int64) int64 {
	return min(s.end, (off+s.block-1)/s.block*s.block)
}

// extend has what is up to off have those flags, and reports whether there is room for more.
func (s *statuses) extend(off int64, flags uint32) bool {
	if off <= s.at {
		return true
	}
	if !s.begun || s.flags != flags {
		if s.left == 0 {
			return false
		}
		s.flush()
		s.left--
		s.begun, s.from, s.flags = true, s.at, flags
	}
	s.at = off
	return true
}

// flush has the last extent written.
func (s *statuses) flush() {
	if s.begun {
		s.b = wire.AppendStatus(s.b, uint32(s.at-s.from), s.flags)
	}
	s.begun = false
}
