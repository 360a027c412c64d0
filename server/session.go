package server

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/nbdctl/nbdctl/server/wire"
)

// An Agreement is what a client and the server have come to in the negotiation, as far as it binds
// the server afterwards. It is plain data, so that it can be written down, as JSON for example, and
// another process can go on with the connection (Server.Resume). Fields that a later version adds
// are zero for what the present one agrees on.
type Agreement struct {
	Export    string     `json:"export"`     // the name by which the client asked for it
	Size      int64      `json:"size"`       // that the client was told, in bytes
	BlockSize int        `json:"block_size"` // that every request is a multiple of, in bytes
	Flags     wire.Flags `json:"flags"`      // that the client was told
	// Structured tells that READ is answered in chunks (NBD_OPT_STRUCTURED_REPLY).
	Structured bool `json:"structured,omitempty"`
	// Extended tells that all headers are extended ones (NBD_OPT_EXTENDED_HEADERS). Then Structured
	// is true, too.
	Extended bool `json:"extended,omitempty"`
	// TLS tells that the client talks over TLS.
	TLS bool `json:"tls,omitempty"`
	// Contexts are what NBD_CMD_BLOCK_STATUS tells of (NBD_OPT_SET_META_CONTEXT).
	Contexts []Context `json:"contexts,omitempty"`
}

// A Context is a meta context of an export, by the number that a client knows it by.
type Context struct {
	ID   uint32 `json:"id"`
	Name string `json:"name"`
}

// A Session is a client that has chosen an export: connection, export, and what was agreed. What
// serves it is its Conn.
type Session struct {
	// Agreement is what was negotiated.
	Agreement Agreement

	export *Export
	conn   *Conn
}

// Export returns the export that the client has chosen.
func (s *Session) Export() *Export { return s.export }

// NetConn returns what the client is served over: the connection that was given to Handshake or
// Resume, or, if Agreement.TLS says so, a *tls.Conn over it.
func (s *Session) NetConn() net.Conn { return s.conn.nc }

// Conn returns the connection, which is to be served by Server.ServeSession or Conn.Transmit, or
// closed: until one of them has ended, the session counts among the MaxConnections of its server,
// within whose MaxMemory it is served, and whose Shutdown and Close end it. Transmit and these two
// leave the socket to the caller, who closes it when Transmit has returned.
func (s *Session) Conn() *Conn { return s.conn }

// Handshake negotiates with a client that has just connected, within the server's HandshakeTimeout;
// for as long it waits for one of the server's MaxConnections to go, should they all be there. The
// deadlines of nc are used for it, and cleared afterwards. When Handshake fails, nc is of no
// further use, and the caller closes it; the error is ErrAborted if to end was what the client
// wanted, and ErrServerClosed after Shutdown and Close.
//
// Serve does this for every client. Handshake is for connections that come from elsewhere.
func (s *Server) Handshake(nc net.Conn) (*Session, error) {
	if err := s.enter(nc); err != nil {
		return nil, err
	}
	return s.greet(nc)
}

// greet is Handshake for a client that has a place, which goes with an error.
func (s *Server) greet(nc net.Conn) (*Session, error) {
	chosen, err := s.negotiate(nc)
	if err != nil {
		s.part(nc)
		return nil, err
	}
	return s.promote(nc, chosen, nil)
}

// Resume makes a session of a connection that was negotiated before, in this process or in another
// one: agreed is what was agreed then, and unread what was received from the client since and not
// executed (Conn.Unread), which belongs to the Conn from now on. It is an error if the export is
// not there any more, or does not keep what was agreed: its name and block size are the same, it
// has all the flags, and it is not smaller. nc must be a *tls.Conn if the client talks over TLS,
// whose state cannot be written down. The place among MaxConnections is waited for as in
// Handshake.
func (s *Server) Resume(nc net.Conn, agreed Agreement, unread []byte) (*Session, error) {
	chosen := &choice{export: s.export(agreed.Export), agreement: agreed, over: nc}
	if err := s.resumes(chosen); err != nil {
		chosen.export.done()
		return nil, fmt.Errorf("server: resume: %w", err)
	}
	if err := s.enter(nc); err != nil {
		chosen.export.done()
		return nil, err
	}
	return s.promote(nc, chosen, unread)
}

// resumes reports what keeps a session from going on.
func (s *Server) resumes(chosen *choice) error {
	agreed := chosen.agreement
	if chosen.export.Export == nil {
		return fmt.Errorf("no export %q", agreed.Export)
	}
	if err := chosen.export.keeps(agreed); err != nil {
		return fmt.Errorf("export %q: %w", agreed.Export, err)
	}
	if _, ok := chosen.over.(*tls.Conn); ok != agreed.TLS || s.RequireTLS && !ok {
		return fmt.Errorf("over TLS: %v, agreed: %v, required: %v", ok, agreed.TLS, s.RequireTLS)
	}
	return nil
}

// agreement returns what a client is told that asks for the export by that name now.
func (e *Export) agreement(name string, structured bool) Agreement {
	return Agreement{
		Export:     name,
		Size:       e.Size(),
		BlockSize:  e.blockSize,
		Flags:      e.promises(&Agreement{Structured: structured}),
		Structured: structured,
	}
}

// promises returns the flags that a client is told with that agreement.
func (e *Export) promises(a *Agreement) wire.Flags {
	f := e.flags
	if a.Structured {
		f |= wire.FlagSendDF
	}
	if a.Extended && len(a.Contexts) > 0 {
		f |= wire.FlagBlockStatusPayload
	}
	return f
}

// keeps reports in what the export falls short of what was agreed.
func (e *Export) keeps(a Agreement) error {
	var all []error
	if a.Extended && !a.Structured {
		all = append(all, errors.New("extended headers were agreed on, and replies that are not structured"))
	}
	if flags := e.promises(&a); a.Flags&^flags != 0 {
		all = append(all, fmt.Errorf("its flags are %v, and %v were agreed", flags, a.Flags))
	}
	for _, c := range a.Contexts {
		if !e.hasContext(c.Name, a.Extended) {
			all = append(all, fmt.Errorf("it has no meta context %q", c.Name))
		}
	}
	if e.blockSize != a.BlockSize {
		all = append(all, fmt.Errorf("its block size is %d bytes, and %d were agreed", e.blockSize, a.BlockSize))
	}
	if size := e.Size(); size < a.Size {
		all = append(all, fmt.Errorf("its size is %d bytes, and %d were agreed", size, a.Size))
	}
	return errors.Join(all...)
}

// blockSizes returns what a client is told that asks for block sizes.
func (e *Export) blockSizes() wire.BlockSizes {
	return wire.BlockSizes{
		Minimum:   uint32(e.blockSize),
		Preferred: uint32(max(e.blockSize, e.preferred, preferredBlock)),
		Maximum:   uint32(e.maxLength),
	}
}
