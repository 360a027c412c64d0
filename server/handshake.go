package server

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

// ErrAborted is what Handshake returns when the client ended the negotiation in order, by
// NBD_OPT_ABORT.
var ErrAborted = errors.New("server: the client ended the negotiation")

const (
	// maxOption is the longest option in bytes that is looked at. The longest name has 4096, and a
	// list of what to be informed of some more.
	maxOption         = 8 << 10
	defaultMaxOptions = 1024
	// preferredBlock is the block size in bytes that a client which asks is told to use.
	preferredBlock = 4 << 10
	// repliesAtOnce is how many bytes of replies are sent in one piece.
	repliesAtOnce = 64 << 10

	offered = wire.FlagFixedNewstyle | wire.FlagNoZeroes
)

// errSilent is the failure of a client that has not said a word.
var errSilent = errors.New("the client has said nothing")

// A handshake is the negotiation with one client. It reads not one byte that belongs to what comes
// after.
type handshake struct {
	nc     net.Conn // a *tls.Conn once the client has begun TLS
	server *Server
	flags  wire.HandshakeFlags // of the client
	option wire.Option         // being answered
	out    []byte              // not sent yet

	structured bool      // replies were agreed on
	extended   bool      // headers were; then replies are structured
	contexts   []Context // that were set last
	contextsOf string    // the name of the export that they are of
}

// A choice is the export that a client has chosen, what it was told of that, and the connection
// that it goes on over.
type choice struct {
	export    lease
	agreement Agreement
	over      net.Conn
}

// negotiate negotiates with a client, within the server's HandshakeTimeout.
func (s *Server) negotiate(nc net.Conn) (*choice, error) {
	if err := nc.SetDeadline(time.Now().Add(s.handshakeTimeout())); err != nil {
		return nil, fmt.Errorf("server: handshake: %w: %w", errSilent, err)
	}
	h := handshake{nc: nc, server: s}
	chosen, err := h.run()
	if over, ok := h.nc.(*tls.Conn); ok && err != nil {
		over.CloseWrite() // "Termination of the session during option haggling"
	}
	if err == ErrAborted {
		return nil, err
	}
	if err == nil {
		if err = nc.SetDeadline(time.Time{}); err != nil {
			chosen.export.done()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("server: handshake: %w", err)
	}
	return chosen, nil
}

func (h *handshake) run() (*choice, error) {
	h.out = wire.AppendGreeting(h.out, offered)
	if err := h.send(); err != nil {
		return nil, fmt.Errorf("%w: %w", errSilent, err)
	}
	var flags [wire.ClientFlagsSize]byte
	switch n, err := io.ReadFull(h.nc, flags[:]); {
	case err != nil && n == 0:
		return nil, fmt.Errorf("%w: %w", errSilent, err)
	case err != nil:
		return nil, fmt.Errorf("client flags: %w", err)
	}
	h.flags = wire.DecodeClientFlags(&flags)
	if h.flags&^offered != 0 {
		return nil, fmt.Errorf("client flags %#x: some of them were not offered", uint32(h.flags))
	}
	for range h.server.maxOptions() {
		var b [wire.OptionSize]byte
		if _, err := io.ReadFull(h.nc, b[:]); err != nil {
			return nil, fmt.Errorf("option: %w", err)
		}
		var o wire.OptionHeader
		if err := o.Decode(&b); err != nil {
			return nil, err
		}
		h.option = o.Option
		chosen, err := h.answer(o.Length)
		if sent := h.send(); err == nil {
			err = sent
		}
		switch {
		case err != nil && chosen != nil:
			chosen.export.done()
			return nil, err
		case err != nil || chosen != nil:
			return chosen, err
		}
	}
	return nil, fmt.Errorf("%d options, and none that ends the negotiation", h.server.maxOptions())
}

func (s *Server) maxOptions() int {
	if s.MaxOptions > 0 {
		return s.MaxOptions
	}
	return defaultMaxOptions
}

// answer reads the data of an option and prepares the reply. A choice ends the negotiation, an
// error too.
func (h *handshake) answer(length uint32) (*choice, error) {
	if h.option != wire.OptExportName && h.flags&wire.FlagFixedNewstyle == 0 {
		return nil, fmt.Errorf("option %d from a client that understands no replies", h.option)
	}
	if length > maxOption || h.option == wire.OptAbort {
		return nil, h.skip(length)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.nc, data); err != nil {
		return nil, fmt.Errorf("data of option %d: %w", h.option, err)
	}
	if h.mustStartTLS() {
		return nil, h.requireTLS()
	}
	switch h.option {
	case wire.OptExportName:
		return h.exportName(string(data))
	case wire.OptStartTLS:
		return nil, h.startTLS(data)
	case wire.OptList:
		return nil, h.list(data)
	case wire.OptInfo, wire.OptGo:
		return h.info(data), nil
	case wire.OptStructuredReply, wire.OptExtendedHeaders:
		h.form(data)
		return nil, nil
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		h.metaContext(data)
		return nil, nil
	default:
		h.refuse(wire.RepErrUnsup, "option not supported")
		return nil, nil
	}
}

// skip answers an option whose data are not looked at: of NBD_OPT_ABORT, and what is too long. They
// are taken from the stream, so that the next option is found behind them. Time bounds that, and no
// memory is taken.
func (h *handshake) skip(length uint32) error {
	if h.option == wire.OptExportName {
		return fmt.Errorf("an export name of %d bytes", length)
	}
	if _, err := io.CopyN(io.Discard, h.nc, int64(length)); err != nil {
		return fmt.Errorf("data of option %d: %w", h.option, err)
	}
	switch {
	case h.option == wire.OptAbort: // Nobody learns anything by it, with TLS or without.
		h.reply(wire.RepAck, nil)
		return ErrAborted
	case h.mustStartTLS():
		return h.requireTLS()
	case h.option == wire.OptSetMetaContext:
		h.contexts, h.contextsOf = nil, ""
	}
	h.refuse(wire.RepErrTooBig, "option too long")
	return nil
}

// choose looks up an export, and notes what a client that chooses it is told. It returns nil if
// there is none of that name.
func (h *handshake) choose(name string) *choice {
	e := h.server.export(name)
	if e.Export == nil {
		return nil
	}
	c := &choice{export: e, agreement: e.agreement(name, h.structured), over: h.nc}
	c.agreement.TLS = h.overTLS()
	c.agreement.Extended = h.extended
	if h.contextsOf == name {
		c.agreement.Contexts = h.contexts
	}
	c.agreement.Flags = e.promises(&c.agreement)
	return c
}

// overTLS reports whether the client has begun TLS.
func (h *handshake) overTLS() bool {
	_, ok := h.nc.(*tls.Conn)
	return ok
}

// mustStartTLS reports whether the option is one for which it is too early.
func (h *handshake) mustStartTLS() bool {
	return h.server.RequireTLS && !h.overTLS() && h.option != wire.OptStartTLS
}

// requireTLS answers any other option in place of NBD_OPT_STARTTLS ("FORCEDTLS mode"), but for
// NBD_OPT_ABORT.
func (h *handshake) requireTLS() error {
	if h.option == wire.OptExportName {
		return errors.New("NBD_OPT_EXPORT_NAME in plain text, and TLS is required")
	}
	h.refuse(wire.RepErrTLSRequired, "TLS is required")
	return nil
}

// startTLS answers NBD_OPT_STARTTLS, and forgets whatever was negotiated before: somebody else may
// have said that. What lies behind the option is part of the TLS handshake, and of nothing else.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case h.server.TLS == nil:
		h.refuse(wire.RepErrPolicy, "this server has no TLS")
	case h.overTLS():
		h.refuse(wire.RepErrInvalid, "TLS was begun before")
	case len(data) > 0:
		h.refuse(wire.RepErrInvalid, "the option takes no data")
	default:
		h.reply(wire.RepAck, nil)
		if err := h.send(); err != nil {
			return err
		}
		over, err := h.server.startTLS(h.nc)
		if err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		*h = handshake{nc: over, server: h.server, flags: h.flags}
	}
	return nil
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no way to refuse but to hang up.
func (h *handshake) exportName(name string) (*choice, error) {
	if h.extended {
		return nil, errors.New("NBD_OPT_EXPORT_NAME from a client that has extended headers")
	}
	c := h.choose(name)
	if c == nil {
		return nil, fmt.Errorf("no export %q", name)
	}
	noZeroes := h.flags&wire.FlagNoZeroes != 0
	h.out = wire.AppendExportName(h.out, uint64(c.agreement.Size), c.agreement.Flags, noZeroes)
	return c, nil
}

// list answers NBD_OPT_LIST.
func (h *handshake) list(data []byte) error {
	if len(data) > 0 {
		h.refuse(wire.RepErrInvalid, "NBD_OPT_LIST takes no data")
		return nil
	}
	list := h.server.List
	if list == nil {
		list = h.server.all
	}
	for name, details := range list {
		h.reply(wire.RepServer, wire.AppendServer(nil, name, details))
		if len(h.out) > repliesAtOnce {
			if err := h.send(); err != nil {
				return err
			}
		}
	}
	h.reply(wire.RepAck, nil)
	return nil
}

// all has the names and descriptions of Exports.
func (s *Server) all(yield func(name, details string) bool) {
	for _, name := range slices.Sorted(maps.Keys(s.Exports)) {
		var details string
		if e := s.Exports[name]; e != nil {
			details = *e.description.Load()
		}
		if !yield(name, details) {
			return
		}
	}
}

// info answers NBD_OPT_INFO and NBD_OPT_GO, and returns a choice if the client goes.
func (h *handshake) info(data []byte) *choice {
	asked, ok := wire.ParseInfoRequest(data)
	if !ok {
		h.refuse(wire.RepErrInvalid, "malformed data")
		return nil
	}
	c := h.choose(asked.Name)
	if c == nil {
		h.refuse(wire.RepErrUnknown, "no such export")
		return nil
	}
	a := &c.agreement
	h.reply(wire.RepInfo, wire.AppendInfoExport(nil, uint64(a.Size), a.Flags))
	if asked.Asks(wire.InfoName) {
		h.reply(wire.RepInfo, wire.AppendInfoText(nil, wire.InfoName, asked.Name))
	}
	if text := *c.export.description.Load(); asked.Asks(wire.InfoDescription) && text != "" {
		h.reply(wire.RepInfo, wire.AppendInfoText(nil, wire.InfoDescription, text))
	}
	if asked.Asks(wire.InfoBlockSize) || a.BlockSize > 1 {
		h.reply(wire.RepInfo, wire.AppendInfoBlockSize(nil, c.export.blockSizes()))
	}
	h.reply(wire.RepAck, nil)
	if h.option == wire.OptInfo {
		c.export.done()
		return nil
	}
	return c
}

// form answers NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS, of which the latter says all
// that the other does. To ask for the same again changes nothing.
func (h *handshake) form(data []byte) {
	extended := h.option == wire.OptExtendedHeaders
	switch {
	case len(data) > 0:
		h.refuse(wire.RepErrInvalid, "the option takes no data")
	case h.extended && !extended:
		h.refuse(wire.RepErrExtHeadersReqd, "extended headers were agreed on")
	default:
		h.structured, h.extended = true, extended
		h.reply(wire.RepAck, nil)
	}
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. Whatever comes of it,
// the latter ends what was set before.
func (h *handshake) metaContext(data []byte) {
	set := h.option == wire.OptSetMetaContext
	if set {
		h.contexts, h.contextsOf = nil, ""
	}
	if !h.structured {
		h.refuse(wire.RepErrInvalid, "NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS comes first")
		return
	}
	asked, ok := wire.ParseMetaRequest(data)
	if !ok {
		h.refuse(wire.RepErrInvalid, "malformed data")
		return
	}
	e := h.server.export(asked.Name)
	if e.Export == nil {
		h.refuse(wire.RepErrUnknown, "no such export")
		return
	}
	defer e.done()
	for _, c := range e.contextsFor(asked.Queries, set, h.extended) {
		id := uint32(0) // in a list, where it has no meaning
		if set {
			h.contexts, h.contextsOf, id = append(h.contexts, c), asked.Name, c.ID
		}
		h.reply(wire.RepMetaContext, wire.AppendMetaContext(nil, id, c.Name))
	}
	h.reply(wire.RepAck, nil)
}

// refuse replies with an error, and a text that a client may show.
func (h *handshake) refuse(code wire.OptionReply, why string) { h.reply(code, []byte(why)) }

func (h *handshake) reply(code wire.OptionReply, data []byte) {
	h.out = wire.AppendOptionReply(h.out, h.option, code, data)
}

// send sends what is waiting to be.
func (h *handshake) send() error {
	if len(h.out) == 0 {
		return nil
	}
	_, err := h.nc.Write(h.out)
	h.out = h.out[:0]
	return err
}
