package server_test

import (
	"encoding/binary"
	"fmt"
)

// A transcript reads a dialogue as the protocol has it, to know which phase it has come to, and
// what has occurred in it. What makes no sense ends the reading: dialogues may have that at their
// end.
type transcript struct {
	seen map[string]int // how often something has occurred

	said, answered stream // not read yet
	greeted        bool   // the server has
	flagged        bool   // the client has sent its flags, and they are:
	flags          uint32
	pending        uint32 // option that waits for its final reply; 0: none
	form           string // of replies in the transmission: simple, structured or extended
	transmission   bool
	lost           bool              // what comes makes no sense
	reads          map[uint64]uint32 // length of READs, by cookie
}

// phase returns the name of the phase, or, in the transmission, of the form that messages have.
func (r *transcript) phase() string {
	if !r.transmission {
		return "negotiation"
	}
	return r.form
}

func (r *transcript) steps(steps []step) {
	for _, s := range steps {
		switch s.do {
		case "C":
			r.said = r.said.then(s.data)
		case "S":
			r.answered = r.answered.then(s.data)
		case "tls":
			r.note("tls")
		}
		r.read()
	}
}

func (r *transcript) note(format string, args ...any) {
	if r.seen == nil {
		r.seen = make(map[string]int)
	}
	r.seen[fmt.Sprintf(format, args...)]++
}

// read reads as much as is there.
func (r *transcript) read() {
	if r.form == "" {
		r.form, r.reads = "simple", make(map[uint64]uint32)
	}
	for !r.lost && (r.readClient() || r.readServer()) {
	}
}

// take returns the first n bytes of s, if they are there, and takes them.
func take(s *stream, n int) (taken []byte, ok bool) {
	b := s.head(n)
	if len(b) < n {
		return nil, false
	}
	*s = s.drop(uint64(n))
	return b, true
}

// skip takes a header and n bytes behind it, if all are there.
func skip(s *stream, header int, n uint64) bool {
	ok := s.size() >= uint64(header)+n
	if ok {
		*s = s.drop(uint64(header) + n)
	}
	return ok
}

// readClient reads a message of the client, and reports whether one was there.
func (r *transcript) readClient() bool {
	switch {
	case !r.greeted || r.pending != 0:
		return false
	case r.transmission:
		return r.readRequest()
	case !r.flagged:
		b, ok := take(&r.said, 4)
		if ok {
			r.flagged, r.flags = true, binary.BigEndian.Uint32(b)
			r.note("client flags %d", r.flags)
		}
		return ok
	}
	h := r.said.head(16)
	if len(h) < 16 || string(h[:8]) != "IHAVEOPT" {
		r.lost = len(h) == 16
		return false
	}
	option, length := binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:])
	if !skip(&r.said, 16, uint64(length)) {
		return false
	}
	r.pending = option
	r.note("option %d", option)
	return true
}

func (r *transcript) readRequest() bool {
	size, magic := 28, uint32(0x25609513)
	if r.form == "extended" {
		size, magic = 32, 0x21e41c71
	}
	h, ok := take(&r.said, size)
	if !ok {
		return false
	}
	if binary.BigEndian.Uint32(h) != magic {
		r.lost = true
		return false
	}
	flags, command := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
	cookie, length := binary.BigEndian.Uint64(h[8:]), uint64(binary.BigEndian.Uint32(h[24:]))
	if r.form == "extended" {
		length = binary.BigEndian.Uint64(h[24:])
	}
	r.note("command %d %s", command, r.form)
	for bit := range 16 {
		if flags&(1<<bit) != 0 {
			r.note("command %d %s flag %d", command, r.form, min(bit, 6))
		}
	}
	if command == 0 {
		r.reads[cookie] = uint32(length)
	}
	if command == 1 || r.form == "extended" && flags&(1<<5) != 0 {
		r.lost = !skip(&r.said, 0, length)
	}
	return !r.lost
}

// readServer reads a message of the server, and reports whether one was there.
func (r *transcript) readServer() bool {
	switch {
	case !r.greeted:
		b, ok := take(&r.answered, 18)
		r.greeted = ok
		r.lost = ok && string(b[:16]) != "NBDMAGICIHAVEOPT"
		return ok
	case r.transmission:
		return r.readReply()
	case r.pending == 1:
		size := 134
		if r.flags&2 != 0 {
			size = 10
		}
		b, ok := take(&r.answered, size)
		if ok {
			r.noteExport(b)
			r.note("option 1 chosen")
			r.transmission, r.pending = true, 0
		}
		return ok
	}
	h := r.answered.head(20)
	if r.pending == 0 || len(h) < 20 {
		return false
	}
	magic, option := binary.BigEndian.Uint64(h), binary.BigEndian.Uint32(h[8:])
	code, length := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
	data, ok := take(&r.answered, 20+int(length))
	if r.lost = magic != 0x0003e889045565a9 || option != r.pending; r.lost || !ok {
		return false
	}
	r.readOptionReply(option, code, data[20:])
	return true
}

func (r *transcript) readOptionReply(option, code uint32, data []byte) {
	r.note("reply %d", code)
	if code == 3 && len(data) >= 2 {
		info := binary.BigEndian.Uint16(data)
		r.note("info %d", info)
		if info == 0 && len(data) == 12 {
			r.noteExport(data[2:])
		}
	}
	switch {
	case code>>31 != 0:
		r.note("option %d refused", option)
		r.pending = 0
	case code == 1:
		r.note("option %d granted", option)
		r.pending = 0
		r.transmission = option == 7
		switch {
		case option == 5:
			r.form = "simple"
		case option == 8 && r.form == "simple":
			r.form = "structured"
		case option == 11:
			r.form = "extended"
		}
	}
}

// noteExport notes the transmission flags behind a size.
func (r *transcript) noteExport(b []byte) {
	flags := binary.BigEndian.Uint16(b[8:])
	for bit := range 16 {
		if flags&(1<<bit) != 0 {
			r.note("transmission flag %d", bit)
		}
	}
}

func (r *transcript) readReply() bool {
	h := r.answered.head(32 + 6)
	if len(h) < 16 {
		return false
	}
	cookie, size := binary.BigEndian.Uint64(h[8:]), 16
	var length uint64
	switch magic := binary.BigEndian.Uint32(h); {
	case magic == 0x67446698 && r.form != "extended":
		errno := binary.BigEndian.Uint32(h[4:])
		if errno == 0 {
			length = uint64(r.reads[cookie])
		}
		if skip(&r.answered, size, length) {
			delete(r.reads, cookie)
			r.note("error %d %s", errno, r.form)
			return true
		}
		return false
	case magic == 0x668e33ef && r.form == "structured" && len(h) >= 20:
		size, length = 20, uint64(binary.BigEndian.Uint32(h[16:]))
	case magic == 0x6e8a278c && r.form == "extended" && len(h) >= 32:
		size, length = 32, binary.BigEndian.Uint64(h[24:])
	default:
		r.lost = magic != 0x668e33ef && magic != 0x6e8a278c
		return false
	}
	if !skip(&r.answered, size, length) {
		return false
	}
	chunk := binary.BigEndian.Uint16(h[6:])
	r.note("chunk %d %s", chunk, r.form)
	if chunk>>15 != 0 && length >= 6 {
		r.note("error %d %s", binary.BigEndian.Uint32(h[size:]), r.form)
	}
	return true
}
