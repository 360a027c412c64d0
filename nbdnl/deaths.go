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
	// Join makes it hear the driver, again after the module was loaded anew. It blocks as a command
	// does.
	Join() error
	// Close wakes Read.
	io.Closer
}

// A deathConn is a netlink socket that has joined the family's multicast group, into which
// nbd_dead_link_work speaks.
type deathConn struct {
	*genetlink.Conn
	driver *netlinkDriver
}

func (d *netlinkDriver) deaths() (deathSource, error) {
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return nil, os.ErrClosed
	}
	conn, err := d.dial()
	if err != nil {
		return nil, err
	}
	c := deathConn{conn, d}
	if err := c.Join(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

// Join finds out the group's number, which like the family's can be another each time that the
// module is loaded: its end is the end of all memberships (genl_unregister_mc_groups).
func (c deathConn) Join() error {
	asker, err := c.driver.dial()
	if err != nil {
		return err
	}
	defer asker.Close()
	if err := c.driver.lookup(asker); err != nil {
		return err
	}
	c.driver.mu.Lock()
	groups := c.driver.family.Groups
	c.driver.mu.Unlock()
	for _, g := range groups {
		if g.Name == groupName {
			return c.JoinGroup(g.ID)
		}
	}
	return fmt.Errorf("this kernel has no multicast group %q: %w", groupName, errors.ErrUnsupported)
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
