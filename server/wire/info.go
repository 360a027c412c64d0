package wire

import "encoding/binary"

// An Info is the type of what a client may be informed of about an export, by its number.
type Info uint16

// The types of information ("NBD_OPT_GO").
const (
	InfoExport      Info = 0 // NBD_INFO_EXPORT
	InfoName        Info = 1 // NBD_INFO_NAME
	InfoDescription Info = 2 // NBD_INFO_DESCRIPTION
	InfoBlockSize   Info = 3 // NBD_INFO_BLOCK_SIZE
)

// AppendExportName appends the answer to OptExportName: the size of the export in bytes, its flags,
// and, for a client that has not agreed to FlagNoZeroes, zeroes.
func AppendExportName(b []byte, size uint64, f Flags, noZeroes bool) []byte {
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint16(b, uint16(f))
	if !noZeroes {
		b = append(b, make([]byte, exportNamePadding)...)
	}
	return b
}

// ExportNameSize is the size in bytes of the answer to OptExportName.
func ExportNameSize(noZeroes bool) int {
	if noZeroes {
		return 10
	}
	return 10 + exportNamePadding
}

// An InfoRequest is the data of OptInfo and OptGo: the export that they are about, and what the
// client asks to be informed of, beside what it is told in any case.
type InfoRequest struct {
	Name  string
	Infos []Info
}

// Append appends the data to b.
func (r *InfoRequest) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.Infos)))
	for _, i := range r.Infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// ParseInfoRequest reads the data. It allocates what it returns, which is no longer than data.
func ParseInfoRequest(data []byte) (r InfoRequest, ok bool) {
	name, data, ok := parseString(data)
	if !ok || len(data) < 2 {
		return InfoRequest{}, false
	}
	count := int(binary.BigEndian.Uint16(data))
	if data = data[2:]; len(data) != 2*count {
		return InfoRequest{}, false
	}
	r.Name = name
	for ; len(data) > 0; data = data[2:] {
		r.Infos = append(r.Infos, Info(binary.BigEndian.Uint16(data)))
	}
	return r, true
}

// Asks reports whether the client asks for that information.
func (r *InfoRequest) Asks(i Info) bool {
	for _, asked := range r.Infos {
		if asked == i {
			return true
		}
	}
	return false
}

// AppendInfoExport appends the data of RepInfo that tell size in bytes and flags of an export.
func AppendInfoExport(b []byte, size uint64, f Flags) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoExport))
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, uint16(f))
}

// BlockSizes are what requests must be multiples of, should be, and may be at most ("Block size
// constraints"), in bytes.
type BlockSizes struct {
	Minimum, Preferred, Maximum uint32
}

// AppendInfoBlockSize appends the data of RepInfo that tell the block sizes of an export.
func AppendInfoBlockSize(b []byte, s BlockSizes) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoBlockSize))
	b = binary.BigEndian.AppendUint32(b, s.Minimum)
	b = binary.BigEndian.AppendUint32(b, s.Preferred)
	return binary.BigEndian.AppendUint32(b, s.Maximum)
}

// ParseInfo reads the data of RepInfo: their type and what is behind it.
func ParseInfo(data []byte) (i Info, rest []byte, ok bool) {
	if len(data) < 2 {
		return 0, nil, false
	}
	return Info(binary.BigEndian.Uint16(data)), data[2:], true
}

// ParseExport reads what is behind the type InfoExport, and the beginning of the answer to
// OptExportName.
func ParseExport(rest []byte) (size uint64, f Flags, ok bool) {
	if len(rest) != 10 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint64(rest), Flags(binary.BigEndian.Uint16(rest[8:])), true
}

// ParseBlockSizes reads what is behind the type InfoBlockSize.
func ParseBlockSizes(rest []byte) (s BlockSizes, ok bool) {
	if len(rest) != 12 {
		return BlockSizes{}, false
	}
	return BlockSizes{
		Minimum:   binary.BigEndian.Uint32(rest),
		Preferred: binary.BigEndian.Uint32(rest[4:]),
		Maximum:   binary.BigEndian.Uint32(rest[8:]),
	}, true
}

// AppendServer appends the data of RepServer: the name of an export, and what else there is to tell
// of it, for people.
func AppendServer(b []byte, name, details string) []byte {
	return append(appendString(b, name), details...)
}

// ParseServer reads the data of RepServer: the name of an export and what else the server tells of
// it, for people. It allocates what it returns.
func ParseServer(data []byte) (name, details string, ok bool) {
	name, data, ok = parseString(data)
	return name, string(data), ok
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// parseString reads a string that begins with its length, and returns what is behind it.
func parseString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(n) > uint64(len(data)) {
		return "", nil, false
	}
	return string(data[:n]), data[n:], true
}
