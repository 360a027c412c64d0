package server

import (
	"io"
	"slices"
)

// inboxSize is how much an inbox receives at once: it takes a burst of pipelined headers and small writes in one system call.
// Large payloads do not pass through it.
const inboxSize = 64 << 10

// An inbox is the receiving side of a connection. It never loses a byte: what was received and not consumed can be taken out
// again, so that another process can go on where this one stopped. Used by one goroutine.
type inbox struct {
	src   io.Reader
	ahead []byte // received by an earlier owner of the connection; comes before what src has
	buf   []byte

	start, end int // buf[start:end] was received and is not consumed
}

// peek returns the next n bytes, at most inboxSize, without consuming them. The error is io.EOF if src ended right here, and
// io.ErrUnexpectedEOF if it ended within the n bytes.
func (in *inbox) peek(n int) ([]byte, error) {
	for in.end-in.start < n {
		if in.start > 0 {
			in.end = copy(in.buf, in.buf[in.start:in.end])
			in.start = 0
		}
		m, err := in.receive(in.buf[in.end:])
		in.end += m
		if err != nil && in.end < n {
			if err == io.EOF && in.end > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return in.buf[in.start : in.start+n], nil
}

// skip consumes n bytes that peek has shown.
func (in *inbox) skip(n int) { in.start += n }

// readFull fills p and says how much of it was filled. An error leaves the inbox empty.
func (in *inbox) readFull(p []byte) (int, error) {
	n := copy(p, in.buf[in.start:in.end])
	in.start += n
	for n < len(p) {
		m, err := in.receive(p[n:])
		n += m
		if err != nil && n < len(p) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	return n, nil
}

func (in *inbox) receive(p []byte) (int, error) {
	if len(in.ahead) > 0 {
		n := copy(p, in.ahead)
		in.ahead = in.ahead[n:]
		return n, nil
	}
	return in.src.Read(p)
}

// putBack makes b the first bytes again. Only for an empty inbox.
func (in *inbox) putBack(b []byte) { in.ahead = b }

// unread returns a copy of all that was received and not consumed.
func (in *inbox) unread() []byte {
	return slices.Concat(in.buf[in.start:in.end], in.ahead)
}
