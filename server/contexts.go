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
const statusSize = wire.StatusExtHead + maxExtents*wire.StatusExtSize

// statusChunk returns the type of the chunk that the reply is.
func statusChunk(extended bool) wire.ChunkType {
	if extended {
		return wire.ChunkBlockStatusExt
	}
	return wire.ChunkBlockStatus
}

// status has s tell what the backend has of a range, which is not empty, from its beginning.
func (e *Export) status(s *statuses, off, n int64) error {
	s.begin(int64(e.blockSize), off, n)
	if e.dev.Extenter != nil {
		err := e.dev.Extenter.Extents(off, n, s.add)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if !s.begun {
		s.extend(s.end, 0) // Nothing is known.
	}
	s.flush()
	if s.extended {
		wire.EndStatusExt(s.b)
	}
	return nil
}

// statuses makes extents of whole blocks out of pieces, which come in order and without gaps. A
// block that has any data is data.
type statuses struct {
	b        []byte // the payload of the chunk
	extended bool   // which is one of ChunkBlockStatusExt
	left     int    // how many extents may follow

	block int64
	at    int64  // what is before it is in an extent
	end   int64  // of the range
	begun bool   // an extent, which is not in b yet
	flags uint32 // of it
	from  int64  // where it begins
}

// begin begins the payload.
func (s *statuses) begin(block, off, n int64) {
	s.block, s.at, s.end = block, off, off+n
	if s.extended {
		s.b = wire.AppendStatusExtHead(s.b, allocation.ID)
	} else {
		s.b = wire.AppendContextID(s.b, allocation.ID)
	}
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
	switch n := s.at - s.from; {
	case !s.begun:
	case s.extended:
		s.b = wire.AppendStatusExt(s.b, uint64(n), uint64(s.flags))
	default:
		s.b = wire.AppendStatus(s.b, uint32(n), s.flags)
	}
	s.begun = false
}
