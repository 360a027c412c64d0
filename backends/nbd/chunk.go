package nbd

import (
	"encoding/binary"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// maxErrorPayload is the longest payload of a chunk that tells of an error: a string, with what
	// is around it.
	maxErrorPayload = wire.MaxString + 64
	// maxStatusPayload is the longest payload of a chunk of block status that is taken for one.
	maxStatusPayload = 32 << 20
	// maxExtents is how many extents of a reply are kept. Who wants more asks for the rest.
	maxExtents = 1 << 16
)

// A status is the reply to a BLOCK_STATUS in one context.
type status struct {
	context string
	extents []mark
	came    []uint32 // contexts that were in the reply
}

// A mark is an extent as it comes.
type mark struct{ length, flags uint64 }

// chunk reads the rest of a chunk.
func (k *conn) chunk(s *stream, h *wire.Chunk) error {
	c, err := k.find(h.Cookie)
	switch {
	case err != nil:
		return err
	case k.Extended && h.Offset != c.request.Offset:
		return protocolError("a reply has the offset %d instead of %d", h.Offset, c.request.Offset)
	}
	switch {
	case h.Type.IsError():
		err = k.errorChunk(s, h, c)
	case h.Type == wire.ChunkNone:
		if h.Length != 0 || h.Flags&wire.ChunkDone == 0 {
			err = protocolError("an empty chunk of %d bytes, flags %#x", h.Length, h.Flags)
		}
	case h.Type == wire.ChunkOffsetData && c.request.Command == wire.CmdRead:
		err = k.dataChunk(s, h, c)
	case h.Type == wire.ChunkOffsetHole && c.request.Command == wire.CmdRead:
		err = k.holeChunk(s, h, c)
	case h.Type == wire.ChunkBlockStatus && c.request.Command == wire.CmdBlockStatus && !k.Extended,
		h.Type == wire.ChunkBlockStatusExt && c.request.Command == wire.CmdBlockStatus && k.Extended:
		err = k.statusChunk(s, h, c.status)
	default:
		err = protocolError("a chunk of type %d in the reply to a request for %v", h.Type, c.request.Command)
	}
	if err != nil || h.Flags&wire.ChunkDone == 0 {
		return err
	}
	switch {
	case c.failure != nil:
	case c.request.Command == wire.CmdRead && c.covered.n != uint64(len(c.data)):
		return protocolError("a reply has %d bytes of %d", c.covered.n, len(c.data))
	case c.request.Command == wire.CmdBlockStatus && len(c.status.extents) == 0:
		return protocolError("a reply has no extents of a context that was agreed on")
	}
	k.replied(c)
	return nil
}

func (k *conn) errorChunk(s *stream, h *wire.Chunk, c *call) error {
	if h.Length > maxErrorPayload {
		return protocolError("a chunk tells of an error in %d bytes", h.Length)
	}
	p, err := s.need(int(h.Length))
	if err != nil {
		return err
	}
	errno, text, rest, ok := wire.ParseError(p)
	at := c.request.Offset
	if h.Type == wire.ChunkErrorOffset && ok {
		at, ok = wire.ParseErrorOffset(rest)
		ok = ok && at >= c.request.Offset && at-c.request.Offset <= c.request.Length
	}
	if !ok || errno == wire.ErrnoNone {
		return protocolError("a chunk tells of an error that is none")
	}
	c.fail(errno, text, at)
	return nil
}

// dataChunk puts a piece of the data of a READ where it belongs.
func (k *conn) dataChunk(s *stream, h *wire.Chunk, c *call) error {
	if h.Length <= wire.ChunkOffsetSize {
		return protocolError("a chunk has no data")
	}
	p, err := s.need(wire.ChunkOffsetSize)
	if err != nil {
		return err
	}
	data, err := c.piece(binary.BigEndian.Uint64(p), h.Length-wire.ChunkOffsetSize)
	if err != nil {
		return err
	}
	return s.into(c, data)
}

// holeChunk makes a piece of the data of a READ zeroes.
func (k *conn) holeChunk(s *stream, h *wire.Chunk, c *call) error {
	if h.Length != wire.HoleSize {
		return protocolError("a chunk tells of a hole in %d bytes", h.Length)
	}
	p, err := s.need(wire.HoleSize)
	if err != nil {
		return err
	}
	offset, length, _ := wire.ParseHole(p)
	data, err := c.piece(offset, uint64(length))
	if err != nil {
		return err
	}
	if c.claim() {
		clear(data)
		c.release()
	}
	return nil
}

// piece returns a piece of the data of a READ, which must not have come before.
func (c *call) piece(offset, length uint64) ([]byte, error) {
	from := offset - c.request.Offset
	total := uint64(len(c.data))
	if offset < c.request.Offset || length == 0 || from > total || length > total-from {
		return nil, protocolError("a chunk of %d bytes at %d is not in the request", length, offset)
	}
	if !c.covered.add(from, from+length) {
		return nil, protocolError("a chunk of %d bytes at %d comes twice, or has too many others", length, offset)
	}
	return c.data[from : from+length], nil
}

// statusChunk reads the extents of one context.
func (k *conn) statusChunk(s *stream, h *wire.Chunk, st *status) error {
	head, size := uint64(wire.ContextIDSize), uint64(wire.StatusSize)
	if k.Extended {
		head, size = wire.StatusExtHead, wire.StatusExtSize
	}
	if h.Length < head+size || h.Length > maxStatusPayload || (h.Length-head)%size != 0 {
		return protocolError("a chunk tells of extents in %d bytes", h.Length)
	}
	p, err := s.need(int(head))
	if err != nil {
		return err
	}
	id := binary.BigEndian.Uint32(p)
	count := (h.Length - head) / size
	if told := uint64(0); k.Extended {
		if told = uint64(binary.BigEndian.Uint32(p[4:])); told != 0 && told != count {
			return protocolError("a chunk tells of %d extents and has %d", told, count)
		}
	}
	which, known := k.Contexts.find(id)
	if !known || !st.first(id) {
		return protocolError("a chunk of extents of context %d, which was not agreed on or came before", id)
	}
	for range count {
		if k.Contexts[which].Name != st.context || len(st.extents) == maxExtents {
			return s.skip(h.Length - head)
		}
		if p, err = s.need(int(size)); err != nil {
			return err
		}
		head += size
		var m mark
		if k.Extended {
			m.length, m.flags = wire.DecodeStatusExt((*[wire.StatusExtSize]byte)(p))
		} else {
			length, flags := wire.DecodeStatus((*[wire.StatusSize]byte)(p))
			m = mark{uint64(length), uint64(flags)}
		}
		if m.length == 0 {
			return protocolError("an extent of no bytes")
		}
		st.extents = append(st.extents, m)
	}
	return nil
}

// first notes a context, and reports whether it is there for the first time.
func (st *status) first(id uint32) bool {
	for _, came := range st.came {
		if came == id {
			return false
		}
	}
	st.came = append(st.came, id)
	return true
}
