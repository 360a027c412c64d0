package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// maxReplyData is the longest data of a reply to an option: a string of the protocol, with room
	// for what a server adds to it.
	maxReplyData = 64 << 10
	// maxReplies bounds the replies to one option, but for NBD_OPT_LIST.
	maxReplies = 1 << 10
	// maxListed bounds the exports that a server can list, and maxListedBytes what they take.
	maxListed      = 1 << 16
	maxListedBytes = 16 << 20
)

// A Handshake is a connection on which it is negotiated what it will be used for. Its methods send
// one option each and wait for the answer; they can be called in any order, as often as one likes,
// until Go, ExportName or Abort ends the negotiation. Where the context ends first, and after
// an error that is not an *OptionError, the connection can't be used any more. Not safe for
// concurrent use.
type Handshake struct {
	nc         net.Conn
	noZeroes   bool // agreed on
	fixed      bool // the server answers options that it does not know
	tls        bool
	structured bool
	extended   bool
	contexts   Contexts
	contextsOf string // the export that they are for
	err        error  // why it can't be used any more
	buf        []byte
}

// Greet begins a negotiation on nc, which belongs to the Handshake from now on, unless there is an
// error. Any connection will do that delivers bytes in order and has deadlines.
func Greet(ctx context.Context, nc net.Conn) (*Handshake, error) {
	h := &Handshake{nc: nc}
	err := h.during(ctx, func() error {
		var said [wire.GreetingSize]byte
		if err := h.read(said[:]); err != nil {
			return fmt.Errorf("nbd: no greeting: %w", err)
		}
		flags, err := wire.DecodeGreeting(&said)
		if err != nil {
			return protocolError("%v", err)
		}
		h.fixed = flags&wire.FlagFixedNewstyle != 0
		h.noZeroes = flags&wire.FlagNoZeroes != 0
		return h.write(wire.AppendClientFlags(nil, flags&(wire.FlagFixedNewstyle|wire.FlagNoZeroes)))
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// NetConn returns the connection as it is used now: with TLS, that of package crypto/tls.
func (h *Handshake) NetConn() net.Conn { return h.nc }

// Close gives the connection up without a word.
func (h *Handshake) Close() error {
	if h.err == nil {
		h.err = net.ErrClosed
	}
	return h.nc.Close()
}

// during has f read and write until ctx ends.
func (h *Handshake) during(ctx context.Context, f func() error) error {
	if h.err != nil {
		return h.err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	nc := h.nc // StartTLS replaces it meanwhile; the deadline is that of the same connection.
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() { // The deadline is set, or is just being set.
		h.err = context.Cause(ctx)
		return h.err
	}
	var refused *OptionError
	if err != nil && !errors.As(err, &refused) {
		h.err = err
	}
	return err
}

// read fills p. A connection that ends before is an error that says so.
func (h *Handshake) read(p []byte) error {
	_, err := io.ReadFull(h.nc, p)
	if err == io.EOF {
		return errHungUp
	}
	return err
}

var errHungUp = fmt.Errorf("the server has hung up: %w", io.ErrUnexpectedEOF)

func (h *Handshake) write(p []byte) error {
	_, err := h.nc.Write(p)
	return err
}

// ask sends an option and gives each to the data of each reply that comes before the last one. That
// is an acknowledgement, or an error, which is returned.
func (h *Handshake) ask(o wire.Option, data []byte, each func(t wire.OptionReply, data []byte) error) error {
	if err := h.write(wire.AppendOption(h.buf[:0], o, data)); err != nil {
		return fmt.Errorf("nbd: %v: %w", o, err)
	}
	most := maxReplies
	if o == wire.OptList {
		most = maxListed
	}
	for range most {
		t, data, err := h.reply(o)
		switch {
		case err != nil:
			return err
		case t == wire.RepAck:
			if len(data) > 0 {
				return protocolError("its acknowledgement of %v has %d bytes of data", o, len(data))
			}
			return nil
		case t.IsError():
			return &OptionError{Option: o, Reply: t, Text: readable(string(data))}
		case each == nil:
			return protocolError("its answer to %v is a reply of type %d", o, uint32(t))
		}
		if err := each(t, data); err != nil {
			return err
		}
	}
	return protocolError("its answer to %v has more than %d parts", o, most)
}

// reply receives a reply. The data are gone with the next one.
func (h *Handshake) reply(o wire.Option) (wire.OptionReply, []byte, error) {
	var b [wire.OptionReplySize]byte
	if err := h.read(b[:]); err != nil {
		return 0, nil, fmt.Errorf("nbd: no answer to %v: %w", o, err)
	}
	var r wire.OptionReplyHeader
	switch err := r.Decode(&b); {
	case err != nil:
		return 0, nil, protocolError("%v", err)
	case r.Option != o:
		return 0, nil, protocolError("it answers %v instead of %v", r.Option, o)
	case r.Length > maxReplyData:
		return 0, nil, protocolError("its answer to %v has %d bytes, more than %d", o, r.Length, maxReplyData)
	}
	if cap(h.buf) < int(r.Length) {
		h.buf = make([]byte, r.Length)
	}
	data := h.buf[:r.Length]
	if err := h.read(data); err != nil {
		return 0, nil, fmt.Errorf("nbd: half an answer to %v: %w", o, err)
	}
	return r.Type, data, nil
}

// StartTLS goes on over TLS (NBD_OPT_STARTTLS). What was agreed on before is forgotten. The
// configuration needs a ServerName, unless it verifies otherwise; it is not changed.
func (h *Handshake) StartTLS(ctx context.Context, config *tls.Config) error {
	if h.tls {
		return errors.New("nbd: TLS is in use already")
	}
	return h.during(ctx, func() error {
		if err := h.ask(wire.OptStartTLS, nil, nil); err != nil {
			return err
		}
		// What the server may have said in plain text behind its answer goes to TLS, which
		// does not understand it.
		secure := tls.Client(h.nc, config)
		if err := secure.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("nbd: TLS: %w", err)
		}
		h.nc, h.tls = secure, true
		h.structured, h.extended, h.contexts = false, false, nil
		return nil
	})
}

// StructuredReplies asks for replies that have zeroes as holes, tell where a read has failed, and
// can be of meta contexts (NBD_OPT_STRUCTURED_REPLY). Contexts are chosen afterwards.
func (h *Handshake) StructuredReplies(ctx context.Context) error {
	err := h.during(ctx, func() error { return h.ask(wire.OptStructuredReply, nil, nil) })
	if err == nil {
		h.structured, h.contexts = true, nil
	}
	return err
}

// ExtendedHeaders asks for requests and replies with lengths of 64 bits (NBD_OPT_EXTENDED_HEADERS).
// Structured replies are part of it. Contexts are chosen afterwards.
func (h *Handshake) ExtendedHeaders(ctx context.Context) error {
	err := h.during(ctx, func() error { return h.ask(wire.OptExtendedHeaders, nil, nil) })
	if err == nil {
		h.extended, h.contexts = true, nil
	}
	return err
}

// Abort takes leave of the server (NBD_OPT_ABORT), and closes the connection. Whether the server
// says goodbye does not matter, but it may take until ctx ends.
func (h *Handshake) Abort(ctx context.Context) error {
	err := h.during(ctx, func() error { return h.ask(wire.OptAbort, nil, nil) })
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return errors.Join(err, h.Close())
}
