package wire

import "encoding/binary"

const (
	simpleReplyMagic     = 0x67446698 // NBD_SIMPLE_REPLY_MAGIC
	structuredReplyMagic = 0x668e33ef // NBD_STRUCTURED_REPLY_MAGIC
	extendedReplyMagic   = 0x6e8a278c // NBD_EXTENDED_REPLY_MAGIC

	// SimpleReplySize is the size in bytes of a simple reply without its data: magic, error,
	// cookie.
	SimpleReplySize = 16
	// ChunkSize is the size in bytes of a chunk of a structured reply without its payload: magic,
	// flags, type, cookie, length.
	ChunkSize = 20
	// ExtendedChunkSize is the size in bytes of one with an extended header: magic, flags, type,
	// cookie, offset, length.
	ExtendedChunkSize = 32
)

// A SimpleReply is a reply to one request. The data of a READ follow it if and only if there is no
// error.
type SimpleReply struct {
	Errno  Errno
	Cookie uint64
}

// Put writes the reply to b.
func (r SimpleReply) Put(b *[SimpleReplySize]byte) {
	binary.BigEndian.PutUint32(b[0:], simpleReplyMagic)
	binary.BigEndian.PutUint32(b[4:], uint32(r.Errno))
	binary.BigEndian.PutUint64(b[8:], r.Cookie)
}

// Decode reads a simple reply.
func (r *SimpleReply) Decode(b *[SimpleReplySize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != simpleReplyMagic {
		return outOfStep("reply", uint64(magic), simpleReplyMagic)
	}
	r.Errno = Errno(binary.BigEndian.Uint32(b[4:]))
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	return nil
}

// IsSimpleReply reports whether a reply that begins so is a simple one. It says nothing of others.
func IsSimpleReply(b *[4]byte) bool { return binary.BigEndian.Uint32(b[:]) == simpleReplyMagic }

// ChunkFlags qualify a chunk of a reply.
type ChunkFlags uint16

// ChunkDone marks the last chunk of a reply (NBD_REPLY_FLAG_DONE).
const ChunkDone ChunkFlags = 1 << 0

// A ChunkType says what the payload of a chunk is.
type ChunkType uint16

// The chunk types ("Structured reply types").
const (
	ChunkNone           ChunkType = 0         // NBD_REPLY_TYPE_NONE
	ChunkOffsetData     ChunkType = 1         // NBD_REPLY_TYPE_OFFSET_DATA
	ChunkOffsetHole     ChunkType = 2         // NBD_REPLY_TYPE_OFFSET_HOLE
	ChunkBlockStatus    ChunkType = 5         // NBD_REPLY_TYPE_BLOCK_STATUS
	ChunkBlockStatusExt ChunkType = 6         // NBD_REPLY_TYPE_BLOCK_STATUS_EXT
	ChunkError          ChunkType = 1<<15 + 1 // NBD_REPLY_TYPE_ERROR
	ChunkErrorOffset    ChunkType = 1<<15 + 2 // NBD_REPLY_TYPE_ERROR_OFFSET
)

// IsError reports whether the chunk tells of a failure, also one of a type that is not known.
func (t ChunkType) IsError() bool { return t&(1<<15) != 0 }

// A Chunk is the fixed part of a chunk of a reply.
type Chunk struct {
	Flags  ChunkFlags
	Type   ChunkType
	Cookie uint64
	Offset uint64 // of the request; only an extended header has it
	Length uint64 // of the payload, in bytes
}

// Decode reads a chunk of a structured reply, which has no offset: that stays as it is.
func (c *Chunk) Decode(b *[ChunkSize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != structuredReplyMagic {
		return outOfStep("reply", uint64(magic), structuredReplyMagic)
	}
	c.Flags = ChunkFlags(binary.BigEndian.Uint16(b[4:]))
	c.Type = ChunkType(binary.BigEndian.Uint16(b[6:]))
	c.Cookie = binary.BigEndian.Uint64(b[8:])
	c.Length = uint64(binary.BigEndian.Uint32(b[16:]))
	return nil
}

// Append appends the chunk to b as that of a structured reply: without its offset, and with the low
// 32 bits of its length.
func (c *Chunk) Append(b []byte) []byte {
	b = c.appendFront(b, structuredReplyMagic)
	return binary.BigEndian.AppendUint32(b, uint32(c.Length))
}

// DecodeExtended reads a chunk with an extended header.
func (c *Chunk) DecodeExtended(b *[ExtendedChunkSize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != extendedReplyMagic {
		return outOfStep("reply", uint64(magic), extendedReplyMagic)
	}
	c.Flags = ChunkFlags(binary.BigEndian.Uint16(b[4:]))
	c.Type = ChunkType(binary.BigEndian.Uint16(b[6:]))
	c.Cookie = binary.BigEndian.Uint64(b[8:])
	c.Offset = binary.BigEndian.Uint64(b[16:])
	c.Length = binary.BigEndian.Uint64(b[24:])
	return nil
}

// AppendExtended appends the chunk to b with an extended header.
func (c *Chunk) AppendExtended(b []byte) []byte {
	b = c.appendFront(b, extendedReplyMagic)
	b = binary.BigEndian.AppendUint64(b, c.Offset)
	return binary.BigEndian.AppendUint64(b, c.Length)
}

// appendFront appends what both kinds begin with.
func (c *Chunk) appendFront(b []byte, magic uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(c.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(c.Type))
	return binary.BigEndian.AppendUint64(b, c.Cookie)
}
