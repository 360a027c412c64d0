package server

import "github.com/nbdctl/nbdctl/server/wire"

// A structured reply to a READ comes in chunks, each with its offset: data as they are, and zeroes
// as holes, of which only the length is sent ("Structured reply chunk message").

const (
	maxData = wire.ExtendedChunkSize + wire.ChunkOffsetSize // before the data of a chunk, in bytes
	maxHole = wire.ExtendedChunkSize + wire.HoleSize        // of a chunk that tells of a hole
)

// appendChunk appends the header of a chunk.
func appendChunk(b []byte, c *wire.Chunk, extended bool) []byte {
	if extended {
		return c.AppendExtended(b)
	}
	return c.Append(b)
}

// beginChunks begins the reply to h. One without data is a chunk without any.
func (b *batch) beginChunks(h *wire.Request) {
	b.open.chunks = chunks{
		inUse: true,
		holes: h.Flags&wire.CmdFlagDF == 0,
		size:  wire.ChunkSize,
		last:  wire.Chunk{Type: wire.ChunkNone, Cookie: h.Cookie, Offset: h.Offset},
	}
	if b.extended {
		b.open.chunks.size = wire.ExtendedChunkSize
	}
	if b.open.want == 0 {
		b.open.chunks.at = b.head
		b.header(b.open.chunks.size)
	}
}

// growData adds n bytes to the chunk of data, or begins one.
func (b *batch) growData(n int) {
	c := &b.open.chunks
	if n > 0 && c.last.Type != wire.ChunkOffsetData {
		b.closeChunk(0)
		c.last.Type, c.last.Length, c.at = wire.ChunkOffsetData, wire.ChunkOffsetSize, b.head
		wire.AppendOffset(b.header(c.size + wire.ChunkOffsetSize)[:c.size], c.last.Offset+uint64(b.open.got))
	}
	c.last.Length += uint64(n)
	b.bytes += n
	b.bare = false
}

// growHole adds a hole of n bytes, where that is worth it and there is room.
func (b *batch) growHole(n int) bool {
	c := &b.open.chunks
	if n < minHole || n > b.open.want-b.open.got || len(b.headers)-b.head < maxHole+maxData {
		return false
	}
	b.closeChunk(0)
	c.last.Type, c.last.Length, c.at = wire.ChunkOffsetHole, wire.HoleSize, b.head
	wire.AppendHole(b.header(c.size + wire.HoleSize)[:c.size], c.last.Offset+uint64(b.open.got), uint32(n))
	b.open.got += n
	return true
}

// endChunks ends the reply.
func (b *batch) endChunks() { b.closeChunk(wire.ChunkDone) }

// closeChunk writes the header of the last chunk, if there is one.
func (b *batch) closeChunk(f wire.ChunkFlags) {
	c := &b.open.chunks
	if c.last.Type == wire.ChunkNone && b.open.want > 0 {
		return
	}
	c.last.Flags = f
	appendChunk(b.headers[c.at:c.at], &c.last, b.extended)
}
