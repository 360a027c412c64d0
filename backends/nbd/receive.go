package nbd

import (
	"errors"
	"io"
	"os"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// bufferSize is how much is received at once, at most, of what is not data of a large READ.
	bufferSize = 64 << 10
	// largeRead is from how many bytes on data are received where they belong, without a copy.
	largeRead = 16 << 10
	// smallFill is how much is received at once where the reply before had large data: of the next
	// one's, little is to pass through the buffer.
	smallFill = 512
)

// A stream reads from a connection.
type stream struct {
	k     *conn
	buf   []byte
	have  []byte // of buf, what was received and not used yet
	large bool   // the reply before had large data
}

// need returns the next n bytes, which are good until the next call. n is at most half of
// bufferSize.
func (s *stream) need(n int) ([]byte, error) {
	for len(s.have) < n {
		if err := s.fill(n); err != nil {
			return nil, err
		}
	}
	p := s.have[:n]
	s.have = s.have[n:]
	return p, nil
}

// fill receives something, if anything came, of which n bytes are to be there in the end.
func (s *stream) fill(n int) error {
	if len(s.have) == 0 {
		s.have = s.buf[:0]
	} else if cap(s.have) < max(n, smallFill) { // Little room is left behind it.
		s.have = s.buf[:copy(s.buf, s.have)]
	}
	room := s.have[len(s.have):cap(s.have)]
	if s.large {
		room = room[:min(len(room), max(smallFill, n-len(s.have)))]
	}
	got, err := s.read(room)
	s.have = s.have[:len(s.have)+got]
	if got > 0 {
		return nil // The error comes again.
	}
	return err
}

// read reads once. It returns nothing, and no error, if it was interrupted.
func (s *stream) read(p []byte) (int, error) {
	n, err := s.k.NetConn.Read(p)
	s.k.heard.Add(1)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, s.k.interrupted(len(s.have))
	}
	return n, err
}

// into fills p, which is data of c; a caller that has gone does not get the rest.
func (s *stream) into(c *call, p []byte) error {
	s.large = len(p) >= largeRead
	for len(p) > 0 {
		if !c.claim() {
			return s.skip(uint64(len(p)))
		}
		n, err := s.pour(p)
		c.release()
		if n == 0 && err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// pour moves what was received to p. If there is nothing, it reads into p, or, if that is short,
// into the buffer.
func (s *stream) pour(p []byte) (int, error) {
	var err error
	if len(s.have) == 0 {
		if len(p) >= largeRead {
			return s.read(p)
		}
		err = s.fill(1)
	}
	n := copy(p, s.have)
	s.have = s.have[n:]
	return n, err
}

// skip throws n bytes away.
func (s *stream) skip(n uint64) error {
	for n > 0 {
		p, err := s.need(int(min(n, bufferSize/2)))
		if err != nil {
			return err
		}
		n -= uint64(len(p))
	}
	return nil
}

// receive reads replies until the connection ends, and then tells whoever waits.
func (k *conn) receive() {
	defer k.running.Done()
	s := &stream{k: k, buf: make([]byte, bufferSize)}
	var err error
	for err == nil {
		err = k.reply(s)
	}
	if err == io.EOF {
		err = errHungUp
	}
	k.fail(err)
	for i := range k.calls {
		if c := &k.calls[i]; c.cookie.Swap(0) != 0 {
			c.err = k.err
			c.finish()
		}
	}
}

// reply reads a simple reply, or a chunk of another.
func (k *conn) reply(s *stream) error {
	var chunk wire.Chunk
	switch {
	case k.Extended:
		p, err := s.need(wire.ExtendedChunkSize)
		if err != nil {
			return err
		}
		if err := chunk.DecodeExtended((*[wire.ExtendedChunkSize]byte)(p)); err != nil {
			return protocolError("%v", err)
		}
		return k.chunk(s, &chunk)
	case k.Structured:
		simple, err := s.beginsSimple()
		if err != nil {
			return err
		}
		if simple {
			return k.simple(s)
		}
		p, err := s.need(wire.ChunkSize)
		if err != nil {
			return err
		}
		if err := chunk.Decode((*[wire.ChunkSize]byte)(p)); err != nil {
			return protocolError("%v", err)
		}
		return k.chunk(s, &chunk)
	}
	return k.simple(s)
}

// beginsSimple reports whether a simple reply comes next.
func (s *stream) beginsSimple() (bool, error) {
	const magic = 4
	for len(s.have) < magic {
		if err := s.fill(magic); err != nil {
			return false, err
		}
	}
	return wire.IsSimpleReply((*[magic]byte)(s.have)), nil
}

// find returns the call that a reply is for.
func (k *conn) find(cookie uint64) (*call, error) {
	if i := cookie & (1<<cookieShift - 1); cookie != 0 && i < uint64(len(k.calls)) {
		if c := &k.calls[i]; c.cookie.Load() == cookie {
			return c, nil
		}
	}
	return nil, protocolError("a reply to a request that is not in flight")
}

// simple reads a simple reply.
func (k *conn) simple(s *stream) error {
	p, err := s.need(wire.SimpleReplySize)
	if err != nil {
		return err
	}
	var r wire.SimpleReply
	if err := r.Decode((*[wire.SimpleReplySize]byte)(p)); err != nil {
		return protocolError("%v", err)
	}
	c, err := k.find(r.Cookie)
	if err != nil {
		return err
	}
	switch command := c.request.Command; {
	case k.Structured && (command == wire.CmdRead || command == wire.CmdBlockStatus && r.Errno == wire.ErrnoNone):
		return protocolError("a simple reply to a request for %v where structured ones were agreed on", command)
	case r.Errno != wire.ErrnoNone:
		c.fail(r.Errno, "", c.request.Offset)
	case command == wire.CmdRead:
		if err := s.into(c, c.data); err != nil {
			return err
		}
	}
	k.replied(c)
	return nil
}

// replied gives the call back to its caller.
func (k *conn) replied(c *call) {
	if !k.answered.Load() {
		k.answered.Store(true)
	}
	c.cookie.Store(0)
	c.finish()
}

// fail keeps the first error of a reply.
func (c *call) fail(e wire.Errno, text string, at uint64) {
	if c.failure != nil {
		return
	}
	length := int64(c.request.Length)
	c.failure = &RequestError{
		Command: c.request.Command, Offset: int64(c.request.Offset), Length: length,
		Errno: e, Text: readable(text), At: int64(at),
	}
}
