package nbd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

// Inherit makes a Client that goes on with the connections of one in another process
// (Client.HandOver) which does not use them any more. The files belong to it from then on, and are
// closed in case of an error.
//
// It says nothing to the server. Connections without a file are replaced as if they had been lost
// just now, or, if all are without, at Document.Since; so Options.Reconnect must not be nil then.
// Of the options, Connections and those that are for a negotiation are as the Document has it,
// whatever they say. The keepalive of TCP is set as by Dial, or, with Options.Dial, as package net
// sets it by itself.
func (u URI) Inherit(doc Document, files []*os.File, o Options) (*Client, error) {
	c, err := u.inherit(&doc, files, o)
	closeAll(files)
	return c, err
}

func (u *URI) inherit(doc *Document, files []*os.File, o Options) (*Client, error) {
	if err := doc.check(len(files)); err != nil {
		return nil, err
	}
	doc.Agreement.settle(u, &o)
	o.Connections = len(doc.Connections)
	if err := o.check(); err != nil {
		return nil, err
	}
	config, err := u.tlsConfig(&o)
	if err != nil {
		return nil, err
	}
	switch missing := o.Connections - len(files); {
	case missing > 0 && o.Reconnect == nil:
		return nil, fmt.Errorf("nbd: %d of %d connections did not come along, and are not to be replaced",
			missing, o.Connections)
	case len(files) > 0 && config != nil:
		return nil, errors.New("nbd: the connections of the process before are without TLS")
	}
	sessions, err := doc.sessions(files, &o)
	if err != nil {
		for _, s := range sessions {
			if s.NetConn != nil {
				s.NetConn.Close()
			}
		}
		return nil, err
	}
	c := newClient(sessions, o)
	since, now := doc.Since, time.Now()
	if since.IsZero() || since.After(now) {
		since = now
	}
	c.keep(*u, config, since)
	return c, nil
}

// settle has a negotiation ask for what was agreed on before, and nothing else.
func (a *Agreement) settle(u *URI, o *Options) {
	a.asked = u.Export
	o.NoExtended, o.NoStructured = !a.Extended, !a.Structured
	o.Contexts = a.Contexts.names()
}

// sessions are those of all connections, of which those that are dead have none. In case of an
// error there are some already.
func (d *Document) sessions(files []*os.File, o *Options) ([]*Session, error) {
	var all []*Session
	for _, handed := range d.Connections {
		s := &Session{Agreement: d.Agreement}
		all = append(all, s)
		if handed.Dead {
			continue
		}
		nc, err := connection(files[0], o)
		if err != nil {
			return all, err
		}
		s.NetConn, s.Contexts, files = nc, handed.Contexts, files[1:]
	}
	return all, nil
}

// connection makes one of a copy of a descriptor.
func connection(f *os.File, o *Options) (net.Conn, error) {
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("nbd: a connection from another process: %w", err)
	}
	if !streams(nc) {
		nc.Close()
		return nil, fmt.Errorf("nbd: a connection from another process is no stream: %T", nc)
	}
	if t, ok := nc.(*net.TCPConn); ok && o.Dial == nil {
		// FileConn has set other times. That of unacknowledged data it has left alone.
		_ = t.SetKeepAliveConfig(keepAlive) // A connection that has ended says so when it is used.
	}
	return nc, nil
}

// check refuses what no Client can have written that has so many files.
func (d *Document) check(files int) error {
	if d.Version != DocumentVersion {
		return fmt.Errorf("nbd: the document of the process before has version %d, and not %d", d.Version,
			DocumentVersion)
	}
	n := len(d.Connections)
	if n < 1 || n > maxHanded {
		return fmt.Errorf("nbd: %d connections are not possible, 1 to %d are", n, maxHanded)
	}
	if err := d.Agreement.check(); err != nil {
		return err
	}
	names, alive := d.Agreement.Contexts.names(), 0
	for i, handed := range d.Connections {
		if handed.Dead {
			continue
		}
		alive++
		if err := handed.Contexts.check(); err != nil {
			return err
		}
		if !slices.Equal(handed.Contexts.names(), names) {
			return fmt.Errorf("nbd: connection %d has the contexts %q, and not %q", i, handed.Contexts.names(), names)
		}
	}
	switch {
	case alive != files:
		return fmt.Errorf("nbd: there are %d files for %d connections", files, alive)
	case alive > 0 && d.Agreement.TLS:
		return errors.New("nbd: connections with TLS can't come along from another process")
	case n > 1 && d.Agreement.Flags&wire.FlagCanMultiConn == 0:
		return fmt.Errorf("nbd: the export is for one connection, and not for %d", n)
	}
	return nil
}

// check refuses what no negotiation can have ended with.
func (a *Agreement) check() error {
	if err := wire.CheckString(a.Name); err != nil {
		return fmt.Errorf("nbd: export name: %w", err)
	}
	b := a.BlockSizes
	switch {
	case a.Size < 0:
		return fmt.Errorf("nbd: an export of %d bytes is not possible", a.Size)
	case b != (wire.BlockSizes{}) && !possible(b):
		return fmt.Errorf("nbd: the block sizes %d, %d, %d are not possible", b.Minimum, b.Preferred, b.Maximum)
	case a.Flags&wire.FlagHasFlags == 0:
		return fmt.Errorf("nbd: the flags %#x are not possible", uint16(a.Flags))
	case !a.Structured && (a.Extended || len(a.Contexts) > 0):
		return errors.New("nbd: extended headers and contexts are not possible without structured replies")
	}
	return a.Contexts.check()
}

func (s Contexts) check() error {
	if len(s) > maxContexts {
		return fmt.Errorf("nbd: %d contexts are not possible, at most %d are", len(s), maxContexts)
	}
	for i, x := range s {
		_, twice := s[:i].find(x.ID)
		_, again := s[:i].named(x.Name)
		if err := wire.CheckString(x.Name); err != nil || twice || again {
			return fmt.Errorf("nbd: the context %q, number %d, is not possible, or there twice", x.Name, x.ID)
		}
	}
	return nil
}

// InheritDirect makes a Direct of what was agreed on before, maybe in another process
// (Direct.Agreement). It does not contact the server; Dial makes connections as it does to replace
// one. Of the options, those that are for a negotiation are as the Agreement has it.
func (u URI) InheritDirect(a Agreement, o Options) (*Direct, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	if a.Structured {
		return nil, errors.New("nbd: structured replies were agreed on, which the kernel does not know")
	}
	a.settle(&u, &o)
	if err := o.check(); err != nil {
		return nil, err
	}
	config, err := u.tlsConfig(&o)
	if err != nil {
		return nil, err
	}
	return &Direct{uri: u, config: config, o: o, agreed: a, size: a.inBlocks(o.BlockSize)}, nil
}
