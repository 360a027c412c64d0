package wire

import "encoding/binary"

// ContextAllocation is the meta context that every server may have: what is stored, and how
// ("Metadata querying"). Its extents have StateHole and StateZero.
const ContextAllocation = "base:allocation"

// The flags of extents of ContextAllocation.
const (
	StateHole = 1 << 0 // NBD_STATE_HOLE: not allocated
	StateZero = 1 << 1 // NBD_STATE_ZERO: reads as zeroes
)

// A MetaRequest is the data of OptListMetaContext and OptSetMetaContext: the export that they are
// about, and which contexts of it the client asks for.
type MetaRequest struct {
	Name    string
	Queries []string
}

// Append appends the data to b.
func (r *MetaRequest) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Queries)))
	for _, q := range r.Queries {
		b = appendString(b, q)
	}
	return b
}

// ParseMetaRequest reads the data. It allocates what it returns, which is no longer than data.
func ParseMetaRequest(data []byte) (r MetaRequest, ok bool) {
	name, data, ok := parseString(data)
	if !ok || len(data) < 4 {
		return MetaRequest{}, false
	}
	count := binary.BigEndian.Uint32(data)
	data = data[4:]
	if uint64(count)*4 > uint64(len(data)) {
		return MetaRequest{}, false
	}
	r = MetaRequest{Name: name, Queries: make([]string, count)}
	for i := range r.Queries {
		if r.Queries[i], data, ok = parseString(data); !ok {
			return MetaRequest{}, false
		}
	}
	return r, len(data) == 0
}

// AppendMetaContext appends the data of RepMetaContext: the number and the name of a context.
func AppendMetaContext(b []byte, id uint32, name string) []byte {
	return append(binary.BigEndian.AppendUint32(b, id), name...)
}

// ParseMetaContext reads the data of RepMetaContext.
func ParseMetaContext(data []byte) (id uint32, name string, ok bool) {
	if len(data) < 4 {
		return 0, "", false
	}
	return binary.BigEndian.Uint32(data), string(data[4:]), true
}

// AppendInfoText appends the data of RepInfo that are a text: InfoName or InfoDescription.
func AppendInfoText(b []byte, i Info, text string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(i)), text...)
}
