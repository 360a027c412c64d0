package nbd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// The numbers of the protocol document are written out again in these tests, so that they do not
// say of package wire what it says of itself.
const (
	optExportName   u32 = 1
	optAbort        u32 = 2
	optList         u32 = 3
	optStartTLS     u32 = 5
	optInfo         u32 = 6
	optGo           u32 = 7
	optStructured   u32 = 8
	optListContexts u32 = 9
	optSetContexts  u32 = 10
	optExtended     u32 = 11

	repAck     u32 = 1
	repServer  u32 = 2
	repInfo    u32 = 3
	repContext u32 = 4

	refusedUnsupported u32 = 0x80000001
	refusedPolicy      u32 = 0x80000002
	refusedInvalid     u32 = 0x80000003
	refusedPlatform    u32 = 0x80000004
	refusedWithoutTLS  u32 = 0x80000005
	refusedUnknown     u32 = 0x80000006
	refusedShutdown    u32 = 0x80000007
	refusedBlockSize   u32 = 0x80000008
	refusedTooBig      u32 = 0x80000009
	refusedHeaders     u32 = 0x8000000a

	infoExport      u16 = 0
	infoName        u16 = 1
	infoDescription u16 = 2
	infoBlockSize   u16 = 3

	magicAnswer     u64 = 0x0003e889045565a9
	magicRequest    u32 = 0x25609513
	magicExtRequest u32 = 0x21e41c71
	magicSimple     u32 = 0x67446698
	magicStructured u32 = 0x668e33ef
	magicExtended   u32 = 0x6e8a278c

	cmdRead   u16 = 0
	cmdWrite  u16 = 1
	cmdDisc   u16 = 2
	cmdFlush  u16 = 3
	cmdTrim   u16 = 4
	cmdCache  u16 = 5
	cmdZeroes u16 = 6
	cmdStatus u16 = 7

	done u16 = 1 // a chunk's only flag

	chunkNone        u16 = 0
	chunkData        u16 = 1
	chunkHole        u16 = 2
	chunkStatus      u16 = 5
	chunkStatusExt   u16 = 6
	chunkError       u16 = 0x8001
	chunkErrorOffset u16 = 0x8002
)

// Numbers of so many bits, as they are on the wire.
type (
	u16 uint16
	u32 uint32
	u64 uint64
)

// cat is its parts one after the other: numbers, strings and slices of bytes.
func cat(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case u16:
			b = binary.BigEndian.AppendUint16(b, uint16(p))
		case u32:
			b = binary.BigEndian.AppendUint32(b, uint32(p))
		case u64:
			b = binary.BigEndian.AppendUint64(b, uint64(p))
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic(fmt.Sprintf("%T is nothing that is on the wire", p))
		}
	}
	return b
}

// str is a string behind its length.
func str(s string) []byte { return cat(u32(len(s)), s) }

// greeting is what a server says first.
func greeting(flags u16) []byte { return cat("NBDMAGIC", "IHAVEOPT", flags) }

// option is what a client asks for.
func option(o u32, data ...any) []byte {
	d := cat(data...)
	return cat("IHAVEOPT", o, u32(len(d)), d)
}

// answer is one of the replies to an option.
func answer(o, kind u32, data ...any) []byte {
	d := cat(data...)
	return cat(magicAnswer, o, kind, u32(len(d)), d)
}

// info is the option that asks for information on an export, or to go on with it.
func info(o u32, name string) []byte {
	return option(o, str(name), u16(4), infoExport, infoName, infoDescription, infoBlockSize)
}

// contexts is an option of meta contexts.
func contexts(o u32, export string, queries ...string) []byte {
	data := cat(str(export), u32(len(queries)))
	for _, q := range queries {
		data = cat(data, str(q))
	}
	return option(o, data)
}

// sized is the information of size and flags.
func sized(o u32, size u64, flags u16) []byte { return answer(o, repInfo, infoExport, size, flags) }

// pattern is what an export of these tests has at an offset.
func pattern(off int64, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		at := off + int64(i)
		p[i] = byte(at) ^ byte(at>>8)*31 ^ byte(at>>16)*101 | 1 // It is never zero.
	}
	return p
}

// firstDifference says where two pieces of data differ, which cmp.Diff shows at too great a length.
func firstDifference(got, want []byte) string {
	if bytes.Equal(got, want) {
		return ""
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("byte %d of %d is %#x instead of %#x", i, len(want), got[i], want[i])
		}
	}
	return fmt.Sprintf("%d bytes instead of %d", len(got), len(want))
}
