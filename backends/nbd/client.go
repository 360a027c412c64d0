package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	defaultMaxInFlight = 128
	// unstatedBlock is how requests are aligned that a server without block sizes may refuse
	// otherwise ("Block size constraints"). It is a preference, and no condition.
	unstatedBlock = 4096
)

// Options say how a Client uses a server. The zero value is ready to use.
type Options struct {
	// TLS has the connection use TLS with this configuration, whatever the URI says. It is not
	// changed. Without a ServerName it gets the host of the URI. nil: as the URI says.
	TLS *tls.Config
	// Connections is how many connections there are at most. A server that does not promise that
	// they agree (NBD_FLAG_CAN_MULTI_CONN) gets one. 0: 1.
	Connections int
	// MaxInFlight bounds the requests in flight on one connection; more of them wait. At most
	// 65536. 0: 128.
	MaxInFlight int
	// Contexts are the meta contexts that are of interest beside base:allocation, such as
	// "qemu:dirty-bitmap:b0". The client goes on without those that the export does not have.
	Contexts []string
	// BlockSize, in bytes, leaves out the end of an export that is less than a block. A power of
	// two. 0: what the server says is the least, else 1.
	BlockSize int
	// ReadOnly never sends anything that changes the export.
	ReadOnly bool
	// NoExtended does not ask for extended headers, and NoStructured neither for them nor for
	// structured replies.
	NoExtended, NoStructured bool
	// Dial connects in place of what the URI says: through a proxy, or with a connection of another
	// protocol that was upgraded. It is called again for each connection. nil: as the URI says.
	Dial func(ctx context.Context) (net.Conn, error)
	// Timeout is how long the server may be silent on a connection on which requests are in flight,
	// or up to an eighth longer: then the connection counts as lost. In that time it must also take
	// what is sent at once, which can be 32 MiB and more. 0: for ever.
	Timeout time.Duration
	// Reconnect has connections replaced that are lost. nil: a request fails that was in flight on
	// one, and all do when none is left.
	Reconnect *Reconnect
}

// A Client is an export of a server. It is a backend with the abilities that the export has. Its
// methods are safe for concurrent use; all of them block until the server has answered, unless they
// are given up by a context or by Close.
type Client struct {
	agreed  Agreement
	options Options
	conns   []atomic.Pointer[conn]
	turn    atomic.Uint32 // whose turn it is among conns
	caps    backends.Caps
	size    int64  // in bytes, in whole blocks
	longest int64  // of a READ or WRITE, in bytes
	outage  outage // of what is to be replaced

	closing sync.Once
	closed  error

	handing  sync.Mutex // guards those below
	handover *Handover  // that has not ended; nil: there is none
	ended    bool       // the client is closed, or about to be
}

var _ interface {
	backends.Backend
	io.WriterAt
	backends.Syncer
	backends.FUAWriter
	backends.Trimmer
	backends.Zeroer
	backends.Cacher
	backends.Extenter
	backends.Contexter
	backends.BlockSizer
	backends.Capper
	backends.ReaderAtContext
	backends.WriterAtContext
} = (*Client)(nil)

// Dial connects to the export of a URI (ParseURI).
func Dial(ctx context.Context, uri string, o Options) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return u.Dial(ctx, o)
}

// Dial connects to the export. The context ends with the return.
func (u URI) Dial(ctx context.Context, o Options) (*Client, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	config, err := u.tlsConfig(&o)
	if err != nil {
		return nil, err
	}
	var sessions []*Session
	connect := u.session
	if o.Reconnect != nil && o.Reconnect.Await {
		connect = u.await
	}
	for {
		s, err := connect(ctx, &o, config)
		if err == nil && len(sessions) > 0 && !s.same(&sessions[0].Agreement) {
			s.NetConn.Close()
			err = fmt.Errorf("nbd: two connections to %v have different exports", u)
		}
		if err != nil {
			for _, s := range sessions {
				s.NetConn.Close()
			}
			return nil, err
		}
		sessions = append(sessions, s)
		if len(sessions) >= o.Connections || s.Flags&wire.FlagCanMultiConn == 0 {
			c := newClient(sessions, o)
			c.keep(u, config, time.Time{})
			return c, nil
		}
	}
}

// session makes one connection.
func (u *URI) session(ctx context.Context, o *Options, config *tls.Config) (*Session, error) {
	h, err := u.negotiate(ctx, o, config)
	if err != nil {
		return nil, err
	}
	s, err := h.choose(ctx, u.Export, o)
	if err != nil {
		h.Close()
		return nil, err
	}
	return s, nil
}

// New negotiates on nc, which belongs to the client from now on, and is closed in case of an error.
// Any connection will do that delivers bytes in order and has deadlines. It remains the only one:
// Options.Connections, Options.Dial and Options.Reconnect are not used.
func New(ctx context.Context, nc net.Conn, export string, o Options) (*Client, error) {
	s, err := negotiate(ctx, nc, export, &o)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return newClient([]*Session{s}, o), nil
}

func negotiate(ctx context.Context, nc net.Conn, export string, o *Options) (*Session, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	h, err := greet(ctx, nc, o.TLS)
	if err != nil {
		return nil, err
	}
	return h.choose(ctx, export, o)
}

// Client goes on with the session as a Client with one connection. Of the options, those count that
// are not for a negotiation.
func (s *Session) Client(o Options) (*Client, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	return newClient([]*Session{s}, o), nil
}

func (o *Options) check() error {
	switch {
	case o.Timeout < 0:
		return fmt.Errorf("nbd: a timeout of %v is not possible", o.Timeout)
	case o.BlockSize < 0 || o.BlockSize&(o.BlockSize-1) != 0:
		return fmt.Errorf("nbd: a block size of %d is not a power of two", o.BlockSize)
	case o.Connections < 0:
		return fmt.Errorf("nbd: %d connections are not possible", o.Connections)
	case o.MaxInFlight < 0 || o.MaxInFlight > maxMaxInFlight:
		return fmt.Errorf("nbd: %d requests in flight are not possible, at most %d are", o.MaxInFlight, maxMaxInFlight)
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = defaultMaxInFlight
	}
	return nil
}

// same reports whether two sessions are about the same export, as far as the server tells.
func (a *Agreement) same(b *Agreement) bool {
	return a.Name == b.Name && a.Size == b.Size && a.Flags == b.Flags && a.BlockSizes == b.BlockSizes &&
		a.Structured == b.Structured && a.Extended == b.Extended && slices.Equal(a.Contexts.names(), b.Contexts.names())
}

// inBlocks is the size in bytes without what is less than a block at the end.
func (a *Agreement) inBlocks(size int) int64 {
	unit := max(int64(size), int64(a.BlockSizes.Minimum), 1)
	return a.Size &^ (unit - 1)
}

// longest is how long a READ or WRITE may be, in bytes.
func (a *Agreement) longest() int64 {
	if m := a.BlockSizes.Maximum; m > 0 && m < wire.MaxPayload {
		return int64(m)
	}
	return wire.MaxPayload
}

// newClient makes a client of sessions, of which those are missing that have no connection.
func newClient(sessions []*Session, o Options) *Client {
	c := &Client{agreed: sessions[0].Agreement, options: o, longest: sessions[0].longest()}
	c.size = c.agreed.inBlocks(o.BlockSize)
	c.caps = c.abilities()
	c.conns = make([]atomic.Pointer[conn], len(sessions))
	for i, s := range sessions {
		if s.NetConn == nil {
			c.conns[i].Store(missingConn(s.Agreement, &c.options))
		} else {
			c.conns[i].Store(newConn(s, &c.options))
		}
	}
	return c
}

// abilities are what the flags promise.
func (c *Client) abilities() backends.Caps {
	caps := backends.CapReadContext
	has := func(f wire.Flags, bit backends.Caps) {
		if c.agreed.Flags&f != 0 {
			caps |= bit
		}
	}
	if !c.options.ReadOnly && c.agreed.Flags&wire.FlagReadOnly == 0 {
		caps |= backends.CapWrite | backends.CapWriteContext
		has(wire.FlagSendFlush, backends.CapSync)
		has(wire.FlagSendFUA, backends.CapFUA)
		has(wire.FlagSendTrim, backends.CapTrim)
		has(wire.FlagSendWriteZeroes, backends.CapZero)
	}
	has(wire.FlagSendCache, backends.CapCache)
	for _, x := range c.agreed.Contexts {
		if x.Name == wire.ContextAllocation {
			caps |= backends.CapExtents
		} else {
			caps |= backends.CapContexts
		}
	}
	return caps
}

// Caps implements backends.Capper.
func (c *Client) Caps() backends.Caps { return c.caps }

// Size returns the size in bytes that the server told, in whole blocks (Options.BlockSize). It does
// not change.
func (c *Client) Size() int64 { return c.size }

// Agreement returns what was agreed on with the server. Its slices must not be changed.
func (c *Client) Agreement() Agreement { return c.agreed }

// Connections returns how many connections there are.
func (c *Client) Connections() int { return len(c.conns) }

// BlockSizes returns what the server told, if it did. Requests that are not multiples of the
// minimum are refused before they are sent; longer ones are sent in several.
func (c *Client) BlockSizes() backends.BlockSizes {
	b := c.agreed.BlockSizes
	if b == (wire.BlockSizes{}) {
		return backends.BlockSizes{Preferred: unstatedBlock}
	}
	return backends.BlockSizes{Minimum: int(b.Minimum), Preferred: int(min(b.Preferred, 1<<30))}
}

// conn returns the connection whose turn it is, among those that are alive if any is.
func (c *Client) conn() *conn {
	if len(c.conns) == 1 {
		return c.conns[0].Load()
	}
	turn := int(c.turn.Add(1) % uint32(len(c.conns)))
	for i := range c.conns {
		if k := c.conns[(turn+i)%len(c.conns)].Load(); k.alive() {
			return k
		}
	}
	return c.conns[turn].Load()
}

// do makes a request on some connection, and once more on another if it is lost along with one that
// is going to be replaced.
func (c *Client) do(ctx context.Context, r *request) error {
	k := c.conn()
	err := k.do(ctx, r)
	if err == nil || !c.outage.kept {
		return err
	}
	return c.again(ctx, r, k, err)
}

// Close takes leave of the server. Requests in flight end with an error that matches net.ErrClosed.
// It blocks for a second for each connection at most. While the client is handed over it is
// Handover.Leave.
func (c *Client) Close() error {
	c.handing.Lock()
	h := c.handover
	c.ended = true
	c.handing.Unlock()
	if h != nil {
		return h.Leave()
	}
	c.closing.Do(func() { c.closed = c.end() })
	return c.closed
}

// end ends everything that the client has.
func (c *Client) end() error {
	c.outage.end()
	var all error
	for i := range c.conns {
		all = errors.Join(all, c.conns[i].Load().close())
	}
	return all
}
