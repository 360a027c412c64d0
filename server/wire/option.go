package wire

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	greetingMagic    = 0x4e42444d41474943 // NBDMAGIC, the first that a server says
	optionMagic      = 0x49484156454f5054 // IHAVEOPT
	optionReplyMagic = 0x0003e889045565a9

	// GreetingSize is the size in bytes of what a server says first: two magic numbers, flags.
	GreetingSize = 18
	// ClientFlagsSize is the size in bytes of what a client says first.
	ClientFlagsSize = 4
	// OptionSize is the size in bytes of an option without its data: magic, option, length.
	OptionSize = 16
	// OptionReplySize is the size in bytes of the reply to an option without its data: magic,
	// option, type, length.
	OptionReplySize = 20

	// MaxString is the longest string in bytes ("Values").
	MaxString = 4096

	// exportNamePadding is what clients without FlagNoZeroes get behind the answer to
	// OptExportName.
	exportNamePadding = 124
)

// HandshakeFlags say how server and client negotiate. Those of a server have 16 bits on the wire,
// those of a client 32; their numbers are the same.
type HandshakeFlags uint32

// The handshake flags.
const (
	FlagFixedNewstyle HandshakeFlags = 1 << 0 // NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_C_FIXED_NEWSTYLE
	FlagNoZeroes      HandshakeFlags = 1 << 1 // NBD_FLAG_NO_ZEROES, NBD_FLAG_C_NO_ZEROES
)

// AppendGreeting appends what a server says first. The low 16 bits of its flags are sent.
func AppendGreeting(b []byte, f HandshakeFlags) []byte {
	b = binary.BigEndian.AppendUint64(b, greetingMagic)
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	return binary.BigEndian.AppendUint16(b, uint16(f))
}

// DecodeGreeting reads what a server says first. A server of the oldstyle negotiation says
// something else, which is an error.
func DecodeGreeting(b *[GreetingSize]byte) (HandshakeFlags, error) {
	if magic := binary.BigEndian.Uint64(b[0:]); magic != greetingMagic {
		return 0, outOfStep("server", magic, greetingMagic)
	}
	if magic := binary.BigEndian.Uint64(b[8:]); magic != optionMagic {
		return 0, outOfStep("negotiation", magic, optionMagic)
	}
	return HandshakeFlags(binary.BigEndian.Uint16(b[16:])), nil
}

// AppendClientFlags appends what a client says first.
func AppendClientFlags(b []byte, f HandshakeFlags) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(f))
}

// DecodeClientFlags reads what a client says first.
func DecodeClientFlags(b *[ClientFlagsSize]byte) HandshakeFlags {
	return HandshakeFlags(binary.BigEndian.Uint32(b[:]))
}

// An Option is what a client asks for in the negotiation, by its number.
type Option uint32

// The options ("Option types").
const (
	OptExportName      Option = 1  // NBD_OPT_EXPORT_NAME
	OptAbort           Option = 2  // NBD_OPT_ABORT
	OptList            Option = 3  // NBD_OPT_LIST
	OptStartTLS        Option = 5  // NBD_OPT_STARTTLS
	OptInfo            Option = 6  // NBD_OPT_INFO
	OptGo              Option = 7  // NBD_OPT_GO
	OptStructuredReply Option = 8  // NBD_OPT_STRUCTURED_REPLY
	OptListMetaContext Option = 9  // NBD_OPT_LIST_META_CONTEXT
	OptSetMetaContext  Option = 10 // NBD_OPT_SET_META_CONTEXT
	OptExtendedHeaders Option = 11 // NBD_OPT_EXTENDED_HEADERS
)

var optionNames = map[Option]string{
	OptExportName: "EXPORT_NAME", OptAbort: "ABORT", OptList: "LIST", OptStartTLS: "STARTTLS", OptInfo: "INFO",
	OptGo: "GO", OptStructuredReply: "STRUCTURED_REPLY", OptListMetaContext: "LIST_META_CONTEXT",
	OptSetMetaContext: "SET_META_CONTEXT", OptExtendedHeaders: "EXTENDED_HEADERS",
}

// String returns the name of the option in the protocol document.
func (o Option) String() string {
	if name := optionNames[o]; name != "" {
		return "NBD_OPT_" + name
	}
	return fmt.Sprintf("option %d", uint32(o))
}

// An OptionHeader is the fixed part of an option.
type OptionHeader struct {
	Option Option
	Length uint32 // of the data, in bytes
}

// Decode reads the fixed part of an option.
func (h *OptionHeader) Decode(b *[OptionSize]byte) error {
	if magic := binary.BigEndian.Uint64(b[0:]); magic != optionMagic {
		return outOfStep("option", magic, optionMagic)
	}
	h.Option = Option(binary.BigEndian.Uint32(b[8:]))
	h.Length = binary.BigEndian.Uint32(b[12:])
	return nil
}

// AppendOption appends an option with its data.
func AppendOption(b []byte, o Option, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// An OptionReply is the type of a reply to an option, by its number.
type OptionReply uint32

// The types of replies to options ("Option reply types").
const (
	RepAck         OptionReply = 1 // NBD_REP_ACK
	RepServer      OptionReply = 2 // NBD_REP_SERVER
	RepInfo        OptionReply = 3 // NBD_REP_INFO
	RepMetaContext OptionReply = 4 // NBD_REP_META_CONTEXT

	RepErrUnsup          OptionReply = 1<<31 + 1  // NBD_REP_ERR_UNSUP
	RepErrPolicy         OptionReply = 1<<31 + 2  // NBD_REP_ERR_POLICY
	RepErrInvalid        OptionReply = 1<<31 + 3  // NBD_REP_ERR_INVALID
	RepErrPlatform       OptionReply = 1<<31 + 4  // NBD_REP_ERR_PLATFORM
	RepErrTLSRequired    OptionReply = 1<<31 + 5  // NBD_REP_ERR_TLS_REQD
	RepErrUnknown        OptionReply = 1<<31 + 6  // NBD_REP_ERR_UNKNOWN
	RepErrShutdown       OptionReply = 1<<31 + 7  // NBD_REP_ERR_SHUTDOWN
	RepErrBlockSize      OptionReply = 1<<31 + 8  // NBD_REP_ERR_BLOCK_SIZE_REQD
	RepErrTooBig         OptionReply = 1<<31 + 9  // NBD_REP_ERR_TOO_BIG
	RepErrExtHeadersReqd OptionReply = 1<<31 + 10 // NBD_REP_ERR_EXT_HEADER_REQD
)

// IsError reports whether the reply refuses the option, also for a reason that is not known.
func (r OptionReply) IsError() bool { return r&(1<<31) != 0 }

// An OptionReplyHeader is the fixed part of a reply to an option.
type OptionReplyHeader struct {
	Option Option
	Type   OptionReply
	Length uint32 // of the data, in bytes
}

// Decode reads the fixed part of a reply to an option.
func (h *OptionReplyHeader) Decode(b *[OptionReplySize]byte) error {
	if magic := binary.BigEndian.Uint64(b[0:]); magic != optionReplyMagic {
		return outOfStep("option reply", magic, optionReplyMagic)
	}
	h.Option = Option(binary.BigEndian.Uint32(b[8:]))
	h.Type = OptionReply(binary.BigEndian.Uint32(b[12:]))
	h.Length = binary.BigEndian.Uint32(b[16:])
	return nil
}

// AppendOptionReply appends a reply to an option with its data.
func AppendOptionReply(b []byte, o Option, t OptionReply, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, optionReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(t))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// CheckString reports why s can't be a string of the protocol: those are UTF-8 without zero bytes,
// and at most MaxString bytes long.
func CheckString(s string) error {
	switch {
	case len(s) > MaxString:
		return fmt.Errorf("%d bytes, which begin with %q: the protocol has no string above %d",
			len(s), s[:32], MaxString)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not UTF-8", s)
	case strings.ContainsRune(s, 0):
		return fmt.Errorf("%q has a zero byte in it", s)
	}
	return nil
}
