package server

import (
	"encoding/binary"
	"fmt"
)

// Numbers of the transmission phase, from the section "Transmission phase" of the NBD protocol document.
// They agree with <linux/nbd.h>.
const (
	requestMagic     = 0x25609513 // NBD_REQUEST_MAGIC
	simpleReplyMagic = 0x67446698 // NBD_SIMPLE_REPLY_MAGIC

	headerSize = 28 // magic, flags, type, cookie, offset, length
	replySize  = 16 // magic, error, cookie

	// maxPayload is the longest READ or WRITE in bytes that a server should take from a client that negotiated nothing
	// else ("Block size constraints"), and the longest the Linux client ever sends.
	maxPayload = 32 << 20
)

// An Op is a request type, by its number on the wire.
type Op uint16

// The request types that the server knows.
const (
	OpRead        Op = 0 // NBD_CMD_READ
	OpWrite       Op = 1 // NBD_CMD_WRITE
	OpDisconnect  Op = 2 // NBD_CMD_DISC
	OpFlush       Op = 3 // NBD_CMD_FLUSH
	OpTrim        Op = 4 // NBD_CMD_TRIM
	OpWriteZeroes Op = 6 // NBD_CMD_WRITE_ZEROES
)

// String returns the name of the operation, as it appears in logs.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpDisconnect:
		return "disconnect"
	case OpFlush:
		return "flush"
	case OpTrim:
		return "trim"
	case OpWriteZeroes:
		return "write zeroes"
	default:
		return fmt.Sprintf("command %d", uint16(o))
	}
}

// commandFlags qualify one request, as Flags qualify the export.
type commandFlags uint16

const (
	flagFUA    commandFlags = 1 << 0 // NBD_CMD_FLAG_FUA: durable before the reply
	flagNoHole commandFlags = 1 << 1 // NBD_CMD_FLAG_NO_HOLE: zeroes that stay allocated
)

// A header is the fixed part of a request, as the client sent it: nothing in it has been checked but the magic.
type header struct {
	flags  commandFlags
	op     Op
	cookie uint64 // opaque to the server: the reply repeats it
	offset uint64
	length uint32
}

// decode reads a request header. A wrong magic means that the stream is out of step: nothing behind it makes sense.
func (h *header) decode(b *[headerSize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != requestMagic {
		return fmt.Errorf("request magic %#08x, want %#08x: the stream is out of step", magic, requestMagic)
	}
	h.flags = commandFlags(binary.BigEndian.Uint16(b[4:]))
	h.op = Op(binary.BigEndian.Uint16(b[6:]))
	h.cookie = binary.BigEndian.Uint64(b[8:])
	h.offset = binary.BigEndian.Uint64(b[16:])
	h.length = binary.BigEndian.Uint32(b[24:])
	return nil
}

// appendTo appends the header to b in wire format.
func (h header) appendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, requestMagic)
	b = binary.BigEndian.AppendUint16(b, uint16(h.flags))
	b = binary.BigEndian.AppendUint16(b, uint16(h.op))
	b = binary.BigEndian.AppendUint64(b, h.cookie)
	b = binary.BigEndian.AppendUint64(b, h.offset)
	return binary.BigEndian.AppendUint32(b, h.length)
}

// putReply writes the header of a simple reply. The data of a READ follow it if and only if code is 0.
func putReply(b *[replySize]byte, code errno, cookie uint64) {
	binary.BigEndian.PutUint32(b[0:], simpleReplyMagic)
	binary.BigEndian.PutUint32(b[4:], uint32(code))
	binary.BigEndian.PutUint64(b[8:], cookie)
}
