package wire

import (
	"fmt"
	"strings"
)

// Flags are the transmission flags: what an export promises to its clients, for the whole life of a
// connection ("Transmission flags").
type Flags uint16

// The transmission flags, with their names in the protocol document.
const (
	FlagHasFlags           Flags = 1 << 0  // NBD_FLAG_HAS_FLAGS: always set
	FlagReadOnly           Flags = 1 << 1  // NBD_FLAG_READ_ONLY
	FlagSendFlush          Flags = 1 << 2  // NBD_FLAG_SEND_FLUSH
	FlagSendFUA            Flags = 1 << 3  // NBD_FLAG_SEND_FUA
	FlagRotational         Flags = 1 << 4  // NBD_FLAG_ROTATIONAL
	FlagSendTrim           Flags = 1 << 5  // NBD_FLAG_SEND_TRIM
	FlagSendWriteZeroes    Flags = 1 << 6  // NBD_FLAG_SEND_WRITE_ZEROES
	FlagSendDF             Flags = 1 << 7  // NBD_FLAG_SEND_DF
	FlagCanMultiConn       Flags = 1 << 8  // NBD_FLAG_CAN_MULTI_CONN
	FlagSendResize         Flags = 1 << 9  // NBD_FLAG_SEND_RESIZE
	FlagSendCache          Flags = 1 << 10 // NBD_FLAG_SEND_CACHE
	FlagSendFastZero       Flags = 1 << 11 // NBD_FLAG_SEND_FAST_ZERO
	FlagBlockStatusPayload Flags = 1 << 12 // NBD_FLAG_BLOCK_STATUS_PAYLOAD
)

var flagNames = [...]string{
	"has-flags", "read-only", "flush", "fua", "rotational", "trim", "write-zeroes", "df", "multi-conn",
	"resize", "cache", "fast-zero", "block-status-payload",
}

// String lists the flags by name, separated by commas; bits without a name come last, in
// hexadecimal.
func (f Flags) String() string {
	var names []string
	for i, name := range flagNames {
		if bit := Flags(1) << i; f&bit != 0 {
			names = append(names, name)
			f &^= bit
		}
	}
	if f != 0 {
		names = append(names, fmt.Sprintf("%#x", uint16(f)))
	}
	return strings.Join(names, ",")
}
