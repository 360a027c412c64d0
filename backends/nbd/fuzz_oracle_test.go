package nbd_test

import "encoding/binary"

// An oracle reads what a server says to the requests of FuzzReplies. It is a second reading of the
// protocol document beside the client's, of all that is said at once.
type oracle struct {
	form     form
	left     []byte // of what the server says
	wrong    string // what ended the connection, if the server has not just hung up between replies
	verdicts map[u64]*verdict
}

// A verdict is what becomes of a request.
type verdict struct {
	query
	answered bool // the reply is complete
	failed   bool // it tells of an error
	data     []byte
	got      []bool // which of the data
	pieces   int
	contexts map[u32]bool // whose extents have come
	flags    uint64       // of the first extent of base:allocation
}

// The limits of the client, which are not the protocol's.
const (
	mostErrorPayload  = 4096 + 64
	mostStatusPayload = 32 << 20
	mostPieces        = 1024
)

func newOracle(f form, says []byte) *oracle {
	o := &oracle{form: f, left: says, verdicts: make(map[u64]*verdict)}
	for _, q := range asked {
		v := &verdict{query: q, contexts: make(map[u32]bool)}
		if q.command == cmdRead {
			v.data, v.got = make([]byte, q.length), make([]bool, q.length)
		}
		o.verdicts[q.cookie] = v
	}
	if f == simple {
		delete(o.verdicts, asked[6].cookie)
	}
	return o
}

// take takes n bytes of what the server says, if it says as many.
func (o *oracle) take(n uint64) ([]byte, bool) {
	if n > uint64(len(o.left)) {
		o.wrong = "the server hangs up"
		return nil, false
	}
	p := o.left[:n]
	o.left = o.left[n:]
	return p, true
}

// vague reports whether a READ has more pieces than the client has room for, perhaps: then it may
// have given up.
func (o *oracle) vague() bool {
	for _, v := range o.verdicts {
		if v.pieces > mostPieces {
			return true
		}
	}
	return false
}

// read reads all that there is, up to what is wrong.
func (o *oracle) read() {
	for o.wrong == "" {
		o.reply()
	}
}

// reply reads a simple reply or a chunk.
func (o *oracle) reply() {
	magic, ok := o.take(4)
	if !ok {
		return
	}
	switch u32(binary.BigEndian.Uint32(magic)) {
	case magicSimple:
		if o.form != extended {
			o.simple()
			return
		}
	case magicStructured:
		if o.form == structured {
			o.chunk()
			return
		}
	case magicExtended:
		if o.form == extended {
			o.chunk()
			return
		}
	}
	o.wrong = "magic"
}

// pending returns the request that a reply is for.
func (o *oracle) pending(cookie []byte) *verdict {
	v := o.verdicts[u64(binary.BigEndian.Uint64(cookie))]
	if v == nil || v.answered {
		o.wrong = "cookie"
		return nil
	}
	return v
}

func (o *oracle) simple() {
	p, ok := o.take(12)
	if !ok {
		return
	}
	v := o.pending(p[4:])
	if v == nil {
		return
	}
	errno := binary.BigEndian.Uint32(p)
	if o.form == structured && (v.command == cmdRead || v.command == cmdStatus && errno == 0) {
		o.wrong = "a simple reply"
		return
	}
	v.failed = errno != 0
	if v.command == cmdRead && errno == 0 {
		data, ok := o.take(uint64(v.length))
		if !ok {
			return
		}
		v.put(0, data)
	}
	v.answered = true
}

// put has data come, all of which must be new.
func (v *verdict) put(at int, data []byte) bool {
	for i := range data {
		if v.got[at+i] {
			return false
		}
		v.got[at+i], v.data[at+i] = true, data[i]
	}
	v.pieces++
	return true
}

func (o *oracle) chunk() {
	size := uint64(16)
	if o.form == extended {
		size = 28
	}
	p, ok := o.take(size)
	if !ok {
		return
	}
	flags, kind := binary.BigEndian.Uint16(p), u16(binary.BigEndian.Uint16(p[2:]))
	length := uint64(binary.BigEndian.Uint32(p[size-4:]))
	if o.form == extended {
		length = binary.BigEndian.Uint64(p[size-8:])
	}
	v := o.pending(p[4:12])
	if v == nil {
		return
	}
	if o.form == extended && binary.BigEndian.Uint64(p[12:]) != uint64(v.offset) {
		o.wrong = "offset"
		return
	}
	last := flags&1 != 0
	switch {
	case kind >= 0x8000:
		o.failure(v, kind, length)
	case kind == chunkNone:
		if length != 0 || !last {
			o.wrong = "an empty chunk"
		}
	case kind == chunkData && v.command == cmdRead:
		o.content(v, length)
	case kind == chunkHole && v.command == cmdRead:
		o.hole(v, length)
	case v.command == cmdStatus && o.form == structured && kind == chunkStatus,
		v.command == cmdStatus && o.form == extended && kind == chunkStatusExt:
		o.extents(v, length)
	default:
		o.wrong = "type"
	}
	if o.wrong != "" || !last {
		return
	}
	for _, got := range v.got {
		if !got && !v.failed {
			o.wrong = "bytes are missing"
			return
		}
	}
	if v.command == cmdStatus && !v.failed && !v.contexts[allocationID] {
		o.wrong = "extents are missing"
		return
	}
	v.answered = true
}

func (o *oracle) failure(v *verdict, kind u16, length uint64) {
	if length > mostErrorPayload {
		o.wrong = "a long error"
		return
	}
	p, ok := o.take(length)
	if !ok {
		return
	}
	o.wrong = "an error"
	if len(p) < 6 || binary.BigEndian.Uint32(p) == 0 {
		return
	}
	rest := len(p) - 6 - int(binary.BigEndian.Uint16(p[4:]))
	if rest < 0 {
		return
	}
	if kind == chunkErrorOffset {
		if rest != 8 {
			return
		}
		if at := binary.BigEndian.Uint64(p[len(p)-8:]); at < uint64(v.offset) || at > uint64(v.offset+v.length) {
			return
		}
	}
	o.wrong = ""
	v.failed = true
}

// within returns where in the data of a READ a piece begins.
func (o *oracle) within(v *verdict, offset, length uint64) (at int, ok bool) {
	from, to := uint64(v.offset), uint64(v.offset+v.length)
	if offset < from || offset > to || length == 0 || length > to-offset {
		o.wrong = "out of the range"
		return 0, false
	}
	for _, got := range v.got[offset-from : offset-from+length] {
		if got {
			o.wrong = "twice"
			return 0, false
		}
	}
	return int(offset - from), true
}

func (o *oracle) content(v *verdict, length uint64) {
	if length <= 8 {
		o.wrong = "no data"
		return
	}
	p, ok := o.take(8)
	if !ok {
		return
	}
	at, ok := o.within(v, binary.BigEndian.Uint64(p), length-8)
	if !ok {
		return
	}
	if data, ok := o.take(length - 8); ok {
		v.put(at, data)
	}
}

func (o *oracle) hole(v *verdict, length uint64) {
	if length != 12 {
		o.wrong = "a hole"
		return
	}
	p, ok := o.take(12)
	if !ok {
		return
	}
	n := uint64(binary.BigEndian.Uint32(p[8:]))
	if at, ok := o.within(v, binary.BigEndian.Uint64(p), n); ok {
		v.put(at, make([]byte, n))
	}
}

func (o *oracle) extents(v *verdict, length uint64) {
	head, each := uint64(4), uint64(8)
	if o.form == extended {
		head, each = 8, 16
	}
	if length < head+each || length > mostStatusPayload || (length-head)%each != 0 {
		o.wrong = "a size of extents"
		return
	}
	p, ok := o.take(head)
	if !ok {
		return
	}
	id := u32(binary.BigEndian.Uint32(p))
	if o.form == extended {
		if count := uint64(binary.BigEndian.Uint32(p[4:])); count != 0 && count != (length-head)/each {
			o.wrong = "a number of extents"
			return
		}
	}
	if id != allocationID && id != dirtyID || v.contexts[id] {
		o.wrong = "a context"
		return
	}
	v.contexts[id] = true
	for i := range (length - head) / each {
		p, ok := o.take(each)
		if !ok {
			return
		}
		n, flags := uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))
		if o.form == extended {
			n, flags = binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])
		}
		if id != allocationID {
			continue
		}
		if n == 0 {
			o.wrong = "an extent"
			return
		}
		if i == 0 {
			v.flags = flags
		}
	}
}
