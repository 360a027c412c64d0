package wire

import (
	"encoding/binary"
	"fmt"
)

const (
	requestMagic         = 0x25609513 // NBD_REQUEST_MAGIC
	extendedRequestMagic = 0x21e41c71 // NBD_EXTENDED_REQUEST_MAGIC

	// RequestSize is the size of a request in bytes, without its payload: magic, flags, type,
	// cookie, offset, length.
	RequestSize = 28
	// ExtendedRequestSize is the size of one whose length has 64 bits, which a client sends where
	// extended headers were negotiated.
	ExtendedRequestSize = 32

	// MaxPayload is the longest READ or WRITE in bytes that a server should take from a client that
	// negotiated nothing else ("Block size constraints"), and the longest that the Linux client
	// ever sends.
	MaxPayload = 32 << 20
)

// A Command is a request type, by its number.
type Command uint16

// The request types ("Request types").
const (
	CmdRead        Command = 0 // NBD_CMD_READ
	CmdWrite       Command = 1 // NBD_CMD_WRITE
	CmdDisconnect  Command = 2 // NBD_CMD_DISC
	CmdFlush       Command = 3 // NBD_CMD_FLUSH
	CmdTrim        Command = 4 // NBD_CMD_TRIM
	CmdCache       Command = 5 // NBD_CMD_CACHE
	CmdWriteZeroes Command = 6 // NBD_CMD_WRITE_ZEROES
	CmdBlockStatus Command = 7 // NBD_CMD_BLOCK_STATUS
)

var commandNames = [...]string{
	"read", "write", "disconnect", "flush", "trim", "cache", "write zeroes", "block status",
}

// String returns the name of the command, as it appears in logs.
func (c Command) String() string {
	if int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Writes reports whether the command changes bytes of the export.
func (c Command) Writes() bool { return c == CmdWrite || c == CmdTrim || c == CmdWriteZeroes }

// CommandFlags qualify one request, as Flags qualify an export.
type CommandFlags uint16

// The command flags ("Command flags").
const (
	CmdFlagFUA        CommandFlags = 1 << 0 // NBD_CMD_FLAG_FUA: durable before the reply
	CmdFlagNoHole     CommandFlags = 1 << 1 // NBD_CMD_FLAG_NO_HOLE: zeroes that stay allocated
	CmdFlagDF         CommandFlags = 1 << 2 // NBD_CMD_FLAG_DF: the data in one chunk
	CmdFlagReqOne     CommandFlags = 1 << 3 // NBD_CMD_FLAG_REQ_ONE: one extent
	CmdFlagFastZero   CommandFlags = 1 << 4 // NBD_CMD_FLAG_FAST_ZERO: at once, or not at all
	CmdFlagPayloadLen CommandFlags = 1 << 5 // NBD_CMD_FLAG_PAYLOAD_LEN: the length is of a payload
)

// A Request is the fixed part of a request as it was sent: nothing in it has been checked.
type Request struct {
	Flags   CommandFlags
	Command Command
	Cookie  uint64 // opaque to the server: the reply repeats it
	Offset  uint64 // in bytes
	Length  uint64 // in bytes
}

// Changes reports whether the request changes bytes of the export.
func (r *Request) Changes() bool { return r.Command.Writes() && r.Length > 0 }

// Payload returns how many bytes follow the request. WRITE has them, and with an extended header
// what says so by a flag ("Request message"). WRITE is to have the flag, too, but QEMU's client
// does not set it, as of 10.0 (nbd_send_request).
func (r *Request) Payload(extended bool) uint64 {
	if r.Command == CmdWrite || extended && r.Flags&CmdFlagPayloadLen != 0 {
		return r.Length
	}
	return 0
}

// End returns the offset behind the last byte of the range, modulo 2⁶⁴.
func (r *Request) End() uint64 { return r.Offset + r.Length }

// Decode reads a request. A wrong magic means that the stream is out of step: nothing behind it
// makes sense.
func (r *Request) Decode(b *[RequestSize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != requestMagic {
		return outOfStep("request", uint64(magic), requestMagic)
	}
	r.Flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	r.Command = Command(binary.BigEndian.Uint16(b[6:]))
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
	r.Length = uint64(binary.BigEndian.Uint32(b[24:]))
	return nil
}

// Append appends the request to b. Only the low 32 bits of its length are sent.
func (r *Request) Append(b []byte) []byte {
	b = r.appendFront(b, requestMagic)
	return binary.BigEndian.AppendUint32(b, uint32(r.Length))
}

// DecodeExtended reads a request with an extended header.
func (r *Request) DecodeExtended(b *[ExtendedRequestSize]byte) error {
	if magic := binary.BigEndian.Uint32(b[0:]); magic != extendedRequestMagic {
		return outOfStep("request", uint64(magic), extendedRequestMagic)
	}
	r.Flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	r.Command = Command(binary.BigEndian.Uint16(b[6:]))
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
	r.Length = binary.BigEndian.Uint64(b[24:])
	return nil
}

// AppendExtended appends the request to b with an extended header.
func (r *Request) AppendExtended(b []byte) []byte {
	b = r.appendFront(b, extendedRequestMagic)
	return binary.BigEndian.AppendUint64(b, r.Length)
}

// appendFront appends all but the length.
func (r *Request) appendFront(b []byte, magic uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	return binary.BigEndian.AppendUint64(b, r.Offset)
}

// outOfStep is the error of a message that does not begin as it has to.
func outOfStep(what string, got, want uint64) error {
	return fmt.Errorf("%s magic %#08x, want %#08x: the stream is out of step", what, got, want)
}
