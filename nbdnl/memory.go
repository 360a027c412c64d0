package nbdnl

import (
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// A memory is what a Client knows of one use of an index beyond what the kernel shows.
type memory struct {
	use devices.Use
	// identifier is the one that this Client connected the device with, or has inherited it with.
	// Linux before 5.14 does not keep it.
	identifier string
	connected  bool // by this Client, or for it
	mode       Mode // of that connect
	// timeout is the device's request timeout, if timed: told by this Client.
	timeout time.Duration
	timed   bool
	// disconnected is whether this Client has disconnected the device, which goes on to look
	// connected for as long as somebody keeps it open.
	disconnected bool
}

// recall returns what is known of that very use of the index.
func (c *Client) recall(index int, use devices.Use) memory {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.memories[index]; m.use == use {
		return m
	}
	return memory{use: use}
}

// remember changes what is known of that use of the index, which takes the place of an earlier one.
// So there is at most one memory for each index.
func (c *Client) remember(index int, use devices.Use, change func(*memory)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.memories[index]
	if m.use != use {
		m = memory{use: use}
	}
	change(&m)
	c.memories[index] = m
}

// hasEnded reports whether this Client has disconnected this very use of the index, or has kept it
// connected by ioctls and does so no more.
func (c *Client) hasEnded(index int, use devices.Use) bool {
	m := c.recall(index, use)
	return use.Connected && (m.disconnected || m.connected && m.mode == ModeIoctl && !c.driver.serves(index))
}

// Inherit notes what only the process knows that has connected a device by netlink, and which hands
// it over to this one: the identifier, which Linux before 5.14 does not keep, and the request
// timeout, in whole seconds. From then on the Client knows the device as that process's does. The
// error matches ErrNotOwner if the index has another incarnation by now, or carries another
// identifier, and ErrNotConnected or os.ErrNotExist if there is no device.
func (c *Client) Inherit(index int, identifier string, incarnation Incarnation, timeout time.Duration) error {
	use, err := c.connected(index)
	switch {
	case err != nil:
	case use.Identified && use.Identifier != identifier:
		err = fmt.Errorf("%w: its identifier is %q", ErrNotOwner, use.Identifier)
	case !use.Identified && use.Incarnation != incarnation:
		err = fmt.Errorf("%w: it was connected anew meanwhile", ErrNotOwner)
	}
	if err != nil {
		return newError("inherit", index, err)
	}
	c.remember(index, use, func(m *memory) {
		m.connected, m.mode, m.identifier = true, ModeNetlink, identifier
		m.timed, m.timeout = timeout%time.Second == 0, timeout // The kernel has no other.
	})
	return nil
}
