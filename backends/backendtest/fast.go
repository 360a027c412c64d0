package backendtest

import (
	"bytes"
	"errors"
	"io"
	"os"

	"github.com/nbdctl/nbdctl/backends"
)

// replyRules are what a server may or may not be able to do.
type replyRules struct {
	room  bool // Buffer has room
	files bool // File is possible
}

// A reply collects like a server's: references are looked at later.
type reply struct {
	*subject
	replyRules
	want   int64
	n      int64
	pieces []func() ([]byte, error)
}

func (r *reply) add(how string, n int, piece func() ([]byte, error)) {
	if n < 0 {
		r.Errorf("Reply.%s of %d bytes", how, n)
	}
	r.n += int64(n)
	r.pieces = append(r.pieces, piece)
}

func (r *reply) Bytes(p []byte) {
	r.add("Bytes", len(p), func() ([]byte, error) { return p, nil })
}

func (r *reply) Zeros(n int) {
	r.add("Zeros", n, func() ([]byte, error) { return make([]byte, n), nil })
}

func (r *reply) Buffer(n int) []byte {
	if !r.room {
		return nil
	}
	p := bytes.Repeat([]byte{0xa5}, n) // undefined content
	r.add("Buffer", n, func() ([]byte, error) { return p, nil })
	return p
}

func (r *reply) File(f *os.File, off int64, n int) bool {
	if !r.files || int64(n) != r.want || len(r.pieces) > 0 {
		return false
	}
	p := make([]byte, n)
	if got, err := f.ReadAt(p, off); got < n {
		if err != io.EOF {
			r.Errorf("ReadAtTo: Reply.File: %v", err)
		}
		return false // as a server that has looked at the pages
	}
	r.add("File", n, func() ([]byte, error) { return p, nil })
	return true
}

// ask calls ReadAtTo. nil and ok: it would block.
func (s *subject) ask(off, n int64, rules replyRules) (r *reply, ok bool) {
	r = &reply{subject: s, replyRules: rules, want: n}
	switch err := s.dev.ReadTo.ReadAtTo(r, off, int(n)); {
	case err == backends.ErrWouldBlock:
		return nil, true
	case errors.Is(err, backends.ErrWouldBlock):
		s.Errorf("ReadAtTo of %d bytes at %d: ErrWouldBlock is wrapped", n, off)
		return nil, false
	case err != nil:
		s.Errorf("ReadAtTo of %d bytes at %d: %v", n, off, err)
		return nil, false
	case r.n != n:
		s.Errorf("ReadAtTo of %d bytes at %d gave %d", n, off, r.n)
		return nil, false
	}
	return r, true
}

// data is what the server would send now.
func (r *reply) data() (p []byte, ok bool) {
	for _, piece := range r.pieces {
		b, err := piece()
		if err != nil {
			r.Errorf("ReadAtTo: Reply.File: %v", err)
			return nil, false
		}
		p = append(p, b...)
	}
	return p, true
}

// readTo is ask and data. nil and ok: it would block.
func (s *subject) readTo(off, n int64, rules replyRules) (p []byte, ok bool) {
	r, ok := s.ask(off, n, rules)
	if r == nil {
		return nil, ok
	}
	return r.data()
}

// checkReadTo compares ReadAtTo with ReadAt, for servers of all abilities, and
// with other requests between the answer and its sending.
func checkReadTo(s *subject) {
	span := s.spans()[len(s.spans())-1]
	m := newModel(s, span[0], span[1])
	if m == nil {
		return
	}
	if s.dev.WriterAt != nil {
		for range 50 {
			off, n := s.random(s.rng, span[0], span[1], s.most)
			if !m.write(off, fill(s.rng, n)) {
				return
			}
		}
	}
	for i := range s.opts.Operations {
		rules := replyRules{room: i&1 == 0, files: i&2 == 0}
		type sent struct {
			*reply
			off, n int64
		}
		var burst []sent
		for range 4 {
			off, n := s.random(s.rng, span[0], span[1], s.most)
			r, ok := s.ask(off, n, rules)
			if !ok {
				return
			}
			if r != nil {
				burst = append(burst, sent{r, off, n})
			}
		}
		for _, r := range burst {
			got, ok := r.data()
			if !ok || !m.equal("ReadAtTo", r.off, got, m.at(r.off, r.n)) {
				return
			}
		}
	}
}

// errConnection is what becomes of a payload when its client goes away.
var errConnection = errors.New("backendtest: connection lost")

// A payload gives its bytes, and fails when there are none left to give.
type payload struct {
	left  []byte
	calls int
	short bool // it was asked for more than it had
}

func (p *payload) Into(b []byte) error {
	p.calls++
	n := copy(b, p.left)
	p.left = p.left[n:]
	if n < len(b) {
		p.short = true
		return errConnection
	}
	return nil
}

// writeFrom is WriteAtFrom, or WriteAt if that would block.
func (m *model) writeFrom(off int64, p []byte) bool {
	r := &payload{left: bytes.Clone(p)}
	err := m.dev.WriteFrom.WriteAtFrom(r, off, len(p))
	if ok, done := m.tookNothing(r, err); !ok || done {
		return ok && m.write(off, p)
	}
	copy(m.at(off, int64(len(p))), p)
	switch {
	case r.short:
		m.Errorf("WriteAtFrom of %d bytes at %d asked for more than that", len(p), off)
	case err != nil:
		m.Errorf("WriteAtFrom of %d bytes at %d: %v", len(p), off, err)
	case len(r.left) > 0:
		m.Errorf("WriteAtFrom of %d bytes at %d left %d", len(p), off, len(r.left))
	default:
		return true
	}
	return false
}

// tookNothing handles ErrWouldBlock: it is plain and came before the first byte.
func (m *model) tookNothing(r *payload, err error) (ok, would bool) {
	switch {
	case err == backends.ErrWouldBlock && r.calls == 0:
		return true, true
	case err == backends.ErrWouldBlock:
		m.Errorf("WriteAtFrom: ErrWouldBlock after a call of Into")
		return false, true
	case errors.Is(err, backends.ErrWouldBlock):
		m.Errorf("WriteAtFrom: ErrWouldBlock is wrapped")
		return false, true
	}
	return true, false
}

// checkWriteFrom writes with WriteAtFrom, also with clients that go away.
func checkWriteFrom(s *subject) {
	span := s.spans()[len(s.spans())-1]
	m := newModel(s, span[0], span[1])
	if m == nil {
		return
	}
	for i := range s.opts.Operations {
		off, n := s.random(s.rng, span[0], span[1], s.most)
		if i%4 == 3 {
			if !m.brokenWrite(off, fill(s.rng, n)) {
				return
			}
		} else if !m.writeFrom(off, fill(s.rng, n)) || !m.around("WriteAtFrom", off, n) {
			return
		}
	}
	m.compare("after WriteAtFrom", m.base, int64(len(m.data)))
}

// brokenWrite loses the client after part of p.
func (m *model) brokenWrite(off int64, p []byte) bool {
	n := int64(len(p))
	r := &payload{left: bytes.Clone(p[:m.rng.IntN(len(p))])}
	err := m.dev.WriteFrom.WriteAtFrom(r, off, len(p))
	if ok, done := m.tookNothing(r, err); !ok || done {
		return ok
	}
	if err != errConnection {
		m.Errorf("WriteAtFrom of %d bytes at %d: %v, want the error of Into as it is", n, off, err)
		return false
	}
	got := m.read(off, n)
	if got == nil {
		return false
	}
	for i, c := range got {
		if old := m.at(off, n)[i]; c != old && c != p[i] {
			m.Errorf("WriteAtFrom broken off: byte %d is %#02x, neither %#02x as before nor %#02x",
				off+int64(i), c, old, p[i])
			return false
		}
	}
	copy(m.at(off, n), got)
	return m.around("WriteAtFrom broken off", off, n)
}
