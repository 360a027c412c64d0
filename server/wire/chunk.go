package wire

import "encoding/binary"

const (
	// ChunkOffsetSize is the size in bytes of what comes before the data of ChunkOffsetData: their
	// offset.
	ChunkOffsetSize = 8
	// HoleSize is the size in bytes of the payload of ChunkOffsetHole: offset and length.
	HoleSize = 12
	// ContextIDSize is the size in bytes of what comes before the extents of ChunkBlockStatus.
	ContextIDSize = 4
	// StatusSize is the size in bytes of an extent of ChunkBlockStatus: length and flags.
	StatusSize = 8
	// StatusExtHead is the size in bytes of what comes before the extents of ChunkBlockStatusExt:
	// the number of the context, and how many extents there are.
	StatusExtHead = 8
	// StatusExtSize is the size in bytes of an extent of ChunkBlockStatusExt: length and flags.
	StatusExtSize = 16
	// MaxErrorText is how many bytes of text AppendError takes.
	MaxErrorText = 256
)

// AppendOffset appends the beginning of the payload of ChunkOffsetData.
func AppendOffset(b []byte, offset uint64) []byte {
	return binary.BigEndian.AppendUint64(b, offset)
}

// AppendHole appends the payload of ChunkOffsetHole.
func AppendHole(b []byte, offset uint64, length uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, offset), length)
}

// ParseHole reads the payload of ChunkOffsetHole.
func ParseHole(p []byte) (offset uint64, length uint32, ok bool) {
	if len(p) != HoleSize {
		return 0, 0, false
	}
	return binary.BigEndian.Uint64(p), binary.BigEndian.Uint32(p[8:]), true
}

// AppendContextID appends the beginning of the payload of ChunkBlockStatus. Behind it come extents.
func AppendContextID(b []byte, id uint32) []byte { return binary.BigEndian.AppendUint32(b, id) }

// AppendStatus appends an extent to the payload of ChunkBlockStatus.
func AppendStatus(b []byte, length, flags uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, length), flags)
}

// ParseStatus reads the payload of ChunkBlockStatus: the number of the context, and its extents,
// each of which DecodeStatus reads.
func ParseStatus(p []byte) (id uint32, extents []byte, ok bool) {
	if len(p) < ContextIDSize+StatusSize || (len(p)-ContextIDSize)%StatusSize != 0 {
		return 0, nil, false
	}
	return binary.BigEndian.Uint32(p), p[ContextIDSize:], true
}

// DecodeStatus reads one extent.
func DecodeStatus(b *[StatusSize]byte) (length, flags uint32) {
	return binary.BigEndian.Uint32(b[0:]), binary.BigEndian.Uint32(b[4:])
}

// AppendStatusExtHead appends the beginning of the payload of ChunkBlockStatusExt. Behind it come
// extents, and EndStatusExt.
func AppendStatusExtHead(b []byte, id uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, id), 0)
}

// AppendStatusExt appends an extent to the payload of ChunkBlockStatusExt.
func AppendStatusExt(b []byte, length, flags uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, length), flags)
}

// EndStatusExt writes into p, a payload of ChunkBlockStatusExt, how many extents it has.
func EndStatusExt(p []byte) {
	binary.BigEndian.PutUint32(p[4:], uint32((len(p)-StatusExtHead)/StatusExtSize))
}

// ParseStatusExt reads the payload of ChunkBlockStatusExt: the number of the context, and its
// extents, each of which DecodeStatusExt reads. Their number may be left open.
func ParseStatusExt(p []byte) (id uint32, extents []byte, ok bool) {
	if len(p) < StatusExtHead+StatusExtSize || (len(p)-StatusExtHead)%StatusExtSize != 0 {
		return 0, nil, false
	}
	count := uint64(binary.BigEndian.Uint32(p[4:]))
	if count != 0 && count*StatusExtSize != uint64(len(p)-StatusExtHead) {
		return 0, nil, false
	}
	return binary.BigEndian.Uint32(p), p[StatusExtHead:], true
}

// DecodeStatusExt reads one extent.
func DecodeStatusExt(b *[StatusExtSize]byte) (length, flags uint64) {
	return binary.BigEndian.Uint64(b[0:]), binary.BigEndian.Uint64(b[8:])
}

// AppendStatusChoice appends the payload of a CmdBlockStatus with CmdFlagPayloadLen: how long the
// range is in bytes, and the numbers of the contexts that are of interest.
func AppendStatusChoice(b []byte, length uint64, ids ...uint32) []byte {
	b = binary.BigEndian.AppendUint64(b, length)
	for _, id := range ids {
		b = binary.BigEndian.AppendUint32(b, id)
	}
	return b
}

// ParseStatusChoice reads the payload. It allocates what it returns.
func ParseStatusChoice(p []byte) (length uint64, ids []uint32, ok bool) {
	if len(p) < 8 || len(p)%4 != 0 {
		return 0, nil, false
	}
	length = binary.BigEndian.Uint64(p)
	for p = p[8:]; len(p) > 0; p = p[4:] {
		ids = append(ids, binary.BigEndian.Uint32(p))
	}
	return length, ids, true
}

// AppendError appends the payload of ChunkError: a number, and a text for people, of which at most
// MaxErrorText bytes are taken.
func AppendError(b []byte, e Errno, text string) []byte {
	text = text[:min(len(text), MaxErrorText)]
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

// AppendErrorOffset appends the payload of ChunkErrorOffset: that of ChunkError, and where in the
// export the request has failed.
func AppendErrorOffset(b []byte, e Errno, text string, offset uint64) []byte {
	return binary.BigEndian.AppendUint64(AppendError(b, e, text), offset)
}

// ParseErrorOffset reads what ParseError has left of the payload of ChunkErrorOffset.
func ParseErrorOffset(rest []byte) (offset uint64, ok bool) {
	if len(rest) != 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(rest), true
}

// ParseError reads the payload of ChunkError, and the beginning of that of other chunks that tell
// of a failure, of which rest is what comes behind.
func ParseError(p []byte) (e Errno, text string, rest []byte, ok bool) {
	if len(p) < 6 {
		return 0, "", nil, false
	}
	n := int(binary.BigEndian.Uint16(p[4:]))
	if len(p) < 6+n {
		return 0, "", nil, false
	}
	return Errno(binary.BigEndian.Uint32(p)), string(p[6 : 6+n]), p[6+n:], true
}
