package nbdnl

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// A deathSource tells of connections that died.
type deathSource interface {
	// Read returns the index of a device of which one has died, or anyIndex for what it does not
	// understand. The error matches ENOBUFS when the kernel has dropped some.
	Read() (int, error)
	// Close wakes Read.
	io.Closer
}

// A deathConn is a netlink socket that has joined the family's multicast group, into which
// nbd_dead_link_work speaks.
type deathConn struct{ *genetlink.Conn }

func (d *netlinkDriver) deaths() (deathSource, error) {
	d.mu.Lock()
	groups, closed := d.family.Groups, d.closed
	d.mu.Unlock()
	if closed {
		return nil, os.ErrClosed
	}
	for _, g := range groups {
		if g.Name != groupName {
			continue
		}
		conn, err := d.dial()
		if err != nil {
			return nil, err
		}
		if err := conn.JoinGroup(g.ID); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return deathConn{conn}, nil
	}
	return nil, fmt.Errorf("this kernel has no multicast group %q: %w", groupName, errors.ErrUnsupported)
}

func (c deathConn) Read() (int, error) {
	msgs, _, err := c.Receive()
	var failed *netlink.OpError
	if errors.As(err, &failed) {
		return anyIndex, err
	}
	for _, m := range msgs { // one, for each is a datagram
		if index, ok := decodeLinkDead(m); ok {
			return index, nil
		}
	}
	return anyIndex, nil
}
