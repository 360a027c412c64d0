package server

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A metaContext is a meta context of an export.
type metaContext struct {
	Context      // by the number that it has for all clients
	wide    bool // for those with extended headers only
}

// contextsOf returns the contexts of an export of dev: that of what is stored, and the backend's.
func contextsOf(dev *backends.Device) ([]metaContext, error) {
	all := []metaContext{{Context: Context{ID: 1, Name: wire.ContextAllocation}}}
	if dev.Contexter == nil {
		return all, nil
	}
	for _, c := range dev.Contexter.Contexts() {
		namespace, leaf, ok := strings.Cut(c.Name, ":")
		if err := wire.CheckString(c.Name); err != nil {
			return nil, fmt.Errorf("server: a meta context of the backend: %w", err)
		}
		twice := slices.ContainsFunc(all, func(d metaContext) bool { return d.Name == c.Name })
		if !ok || namespace == "" || namespace == "base" || leaf == "" || twice {
			return nil, fmt.Errorf("server: the backend has a meta context %q, which must be NAMESPACE:LEAF, "+
				"not below base:, and once", c.Name)
		}
		all = append(all, metaContext{Context{ID: uint32(len(all) + 1), Name: c.Name}, c.Wide})
	}
	if len(all) > 1+backends.MaxContexts {
		return nil, fmt.Errorf("server: the backend has %d meta contexts, more than %d",
			len(all)-1, backends.MaxContexts)
	}
	return all, nil
}

// contextsFor returns the contexts that fit one of the queries, each once ("Metadata querying"). A
// client that lists may ask for all, or for a namespace; one that sets knows what it wants.
func (e *Export) contextsFor(queries []string, set, extended bool) (found []Context) {
	for _, c := range e.contexts {
		namespace, _, _ := strings.Cut(c.Name, ":")
		fits := func(q string) bool { return q == c.Name || !set && q == namespace+":" }
		if c.wide && !extended || (set || len(queries) > 0) && !slices.ContainsFunc(queries, fits) {
			continue
		}
		found = append(found, c.Context)
	}
	return found
}

// hasContext reports whether the export has a context that was agreed on.
func (e *Export) hasContext(name string, extended bool) bool {
	return slices.ContainsFunc(e.contexts, func(c metaContext) bool { return c.Name == name && (extended || !c.wide) })
}

// maxExtents bounds the extents in the reply to one NBD_CMD_BLOCK_STATUS. The client asks again for
// what is behind them.
const maxExtents = 4 << 10

// statusSize is the longest reply for one context, in bytes.
const statusSize = wire.ExtendedChunkSize + wire.StatusExtHead + maxExtents*wire.StatusExtSize

// statusChunk returns the type of the chunk that the reply is.
func statusChunk(extended bool) wire.ChunkType {
	if extended {
		return wire.ChunkBlockStatusExt
	}
	return wire.ChunkBlockStatus
}

// errContextGone stands for a context that the backend does not have any more, since Swap.
var errContextGone = errors.New("the backend does not know the meta context")

// status has s tell what the backend has of a range, which is not empty, from its beginning, in one
// context.
func (e *Export) status(s *statuses, name string, off, n int64) error {
	s.begin(int64(e.blockSize), off, n)
	var err error
	switch {
	case name != wire.ContextAllocation && e.dev.Contexter == nil:
		return errContextGone
	case name != wire.ContextAllocation:
		err = e.dev.Contexter.ContextExtents(name, off, n, s.mark)
	case e.dev.Extenter != nil:
		if err = e.dev.Extenter.Extents(off, n, s.add); errors.Is(err, errors.ErrUnsupported) {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	if !s.begun {
		s.extend(s.end, 0) // Nothing is known.
	}
	s.flush()
	if s.extended {
		wire.EndStatusExt(s.b)
	}
	return s.err
}

// A contextSet has a bit for each context of an agreement.
type contextSet uint32

const allContexts = ^contextSet(0)

// choose takes the payload of a NBD_CMD_BLOCK_STATUS, if it is one, for it says how long the range
// is, and in which contexts it is of interest. It has arrived, unless it is too long.
func (l *loop) choose(h *wire.Request) error {
	agreed := &l.conn.agreed
	if h.Length > uint64(8+4*len(agreed.Contexts)) || len(agreed.Contexts) == 0 {
		return errNoChoice
	}
	length, ids, ok := wire.ParseStatusChoice(l.inbox.received()[:h.Length])
	var chosen contextSet
	for _, id := range ids {
		i := slices.IndexFunc(agreed.Contexts, func(c Context) bool { return c.ID == id })
		if i < 0 || chosen&(1<<i) != 0 {
			return errNoChoice
		}
		chosen |= 1 << i
	}
	if !ok || chosen == 0 {
		return errNoChoice
	}
	l.inbox.take(int(h.Length))
	h.Length, h.Flags, l.chosen = length, h.Flags&^wire.CmdFlagPayloadLen, chosen
	return nil
}

// statuses makes extents of whole blocks out of pieces, which come in order and without gaps. A
// block that has any data is data.
type statuses struct {
	id       uint32 // of the context
	b        []byte // the payload of the chunk
	extended bool   // which is one of ChunkBlockStatusExt
	left     int    // how many extents may follow

	block int64
	at    int64  // what is before it is in an extent
	end   int64  // of the range
	begun bool   // an extent, which is not in b yet
	flags uint64 // of it
	from  int64  // where it begins
	err   error  // why this is no answer
}

// begin begins the payload.
func (s *statuses) begin(block, off, n int64) {
	s.block, s.at, s.end = block, off, off+n
	if s.extended {
		s.b = wire.AppendStatusExtHead(s.b, s.id)
	} else {
		s.b = wire.AppendContextID(s.b, s.id)
	}
}

// add adds a piece, and reports whether more are wanted.
func (s *statuses) add(e backends.Extent) bool {
	var flags uint64
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

// mark adds a piece of a context of the backend's, and reports whether more are wanted.
func (s *statuses) mark(m backends.Mark) bool { return s.extend(s.up(m.Offset+m.Length), m.Flags) }

// up returns the end of the block in which off is, if that is not its beginning.
func (s *statuses) up(off int64) int64 {
	return min(s.end, (off+s.block-1)/s.block*s.block)
}

// extend has what is up to off have those flags, and reports whether there is room for more.
func (s *statuses) extend(off int64, flags uint64) bool {
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
		s.b = wire.AppendStatusExt(s.b, uint64(n), s.flags)
	case s.flags > math.MaxUint32:
		s.err = fmt.Errorf("flags %#x of a meta context that is not wide", s.flags)
	default:
		s.b = wire.AppendStatus(s.b, uint32(n), uint32(s.flags))
	}
	s.begun = false
}
