package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A Direct is an export with which somebody else is going to speak: it makes connections on which
// the negotiation has ended with that export. Package server/blockdev gives them to the kernel
// (blockdev.ConnectRemote), which knows simple replies, and no TLS. Its methods are safe for
// concurrent use.
type Direct struct {
	uri    URI
	config *tls.Config
	o      Options
	agreed Agreement
	size   int64 // in bytes, in whole blocks

	mu    sync.Mutex
	first net.Conn // the connection that has told agreed, until somebody wants it
}

// DialDirect connects to the export of a URI (ParseURI) for somebody else. Of the options, those
// count that are for a negotiation, and BlockSize, Connections (how many there are going to be),
// Reconnect.Attempt and Reconnect.Await. Replies will be simple ones. It must be closed.
func DialDirect(ctx context.Context, uri string, o Options) (*Direct, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return u.DialDirect(ctx, o)
}

// DialDirect is DialDirect for a URI that was parsed.
func (u URI) DialDirect(ctx context.Context, o Options) (*Direct, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	o.NoExtended, o.NoStructured = true, true
	config, err := u.tlsConfig(&o)
	if err != nil {
		return nil, err
	}
	connect := u.session
	if o.Reconnect != nil && o.Reconnect.Await {
		connect = u.await
	}
	s, err := connect(ctx, &o, config)
	if err != nil {
		return nil, err
	}
	return &Direct{
		uri: u, config: config, o: o, agreed: s.Agreement, size: s.inBlocks(o.BlockSize), first: s.NetConn,
	}, nil
}

// Agreement returns what was agreed on with the server.
func (d *Direct) Agreement() Agreement { return d.agreed }

// Size returns the size in bytes that the server told, in whole blocks (Options.BlockSize). It does
// not change.
func (d *Direct) Size() int64 { return d.size }

// Flags returns what the server said of the export.
func (d *Direct) Flags() wire.Flags { return d.agreed.Flags }

// BlockSizes returns what the server demands of requests; zero fields are no demand.
func (d *Direct) BlockSizes() backends.BlockSizes {
	b := d.agreed.BlockSizes
	limit := func(n uint32) int { return int(min(n, 1<<30)) }
	return backends.BlockSizes{Minimum: int(b.Minimum), Preferred: limit(b.Preferred), Maximum: limit(b.Maximum)}
}

// Dial makes a connection, which is the caller's. The first is the one that DialDirect has made. An
// export that is not the one that was there at first, as far as a server tells, is an error
// (Reconnect).
func (d *Direct) Dial(ctx context.Context) (net.Conn, error) {
	d.mu.Lock()
	first := d.first
	d.first = nil
	d.mu.Unlock()
	if first != nil {
		return first, nil
	}
	attempt := defaultAttempt
	if d.o.Reconnect != nil {
		attempt = otherwise(d.o.Reconnect.Attempt, defaultAttempt)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, attempt, errNoAnswer)
	defer cancel()
	s, err := d.uri.session(ctx, &d.o, d.config)
	if err != nil {
		return nil, err
	}
	if err := d.agreed.continues(&s.Agreement, d.o.Connections > 1); err != nil {
		return nil, errors.Join(err, s.NetConn.Close())
	}
	return s.NetConn, nil
}

// Close lets go of a connection that nobody wanted. Those that Dial has returned are their owners'.
func (d *Direct) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.first == nil {
		return nil
	}
	err := d.first.Close()
	d.first = nil
	if err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return nil
}
