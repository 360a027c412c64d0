package nbdnl

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// Drop disconnects a device that carries the identifier and drops what is cached of it: it gives
// the kernel's bare command, after which what was written and not yet sent to the server is lost,
// and I/O in flight fails, also for a mounted file system. It does not wait until the index is free
// (see WaitFree). It is for a device whose content does not matter any more; Detach is the safe
// way.
//
// The error matches os.ErrNotExist, ErrNotConnected or ErrNotOwner. Linux before 5.14 keeps no
// identifiers: there a Client knows those that it has connected itself, and of the others the error
// matches errors.ErrUnsupported. Of devices that were connected by ioctls a Client knows its own on
// every kernel.
//
// The command can take for ever, when Timeout is 0 and the server has stopped reading; then only
// ctx ends the wait, and every other control command of the machine waits as well.
func (c *Client) Drop(ctx context.Context, index int, identifier string) error {
	use, err := c.owned(index, identifier)
	if err == nil {
		err = c.disconnect(ctx, index, use)
	}
	return newError("disconnect", index, err)
}

// DropAny is Drop without regard to the identifier.
func (c *Client) DropAny(ctx context.Context, index int) error {
	use, err := c.connected(index)
	if err == nil {
		err = c.disconnect(ctx, index, use)
	}
	return newError("disconnect", index, err)
}

// connected returns the present use of the index, or why there is none.
func (c *Client) connected(index int) (devices.Use, error) {
	use, err := c.sysfs.Use(index)
	if err == nil && !use.Connected {
		err = ErrNotConnected
	}
	return use, err
}

// owned returns the present use of the index if the device carries the identifier.
func (c *Client) owned(index int, identifier string) (devices.Use, error) {
	use, err := c.connected(index)
	if err != nil {
		return use, err
	}
	switch m := c.recall(index, use); {
	case use.Identified && use.Identifier != identifier:
		return use, fmt.Errorf("%w: its identifier is %q", ErrNotOwner, use.Identifier)
	case use.Identified || m.connected && m.identifier == identifier:
		return use, nil
	case m.connected:
		return use, fmt.Errorf("%w: this client has connected it with the identifier %q", ErrNotOwner, m.identifier)
	case c.sysfs.Identifiers:
		return use, fmt.Errorf("%w: it was connected by ioctls", ErrNotOwner)
	}
	return use, fmt.Errorf(
		"this kernel keeps no identifiers, and this client has not connected it with that one: %w",
		errors.ErrUnsupported,
	)
}

// still returns why the index is no longer in the same use. Netlink has no command on a condition,
// but for the identifier of a reconfigure, so that this look comes right before the command.
func (c *Client) still(index int, use devices.Use) error {
	now, err := c.connected(index)
	if err == nil && now != use {
		err = fmt.Errorf("%w: it was connected anew meanwhile", ErrNotOwner)
	}
	return err
}

// disconnect gives the command, if the index is still in that use, and notes that the device is on
// its way out.
func (c *Client) disconnect(ctx context.Context, index int, use devices.Use) error {
	if err := c.reach(ctx); err != nil {
		return err
	}
	_, err := do(ctx, c.limit, func() (struct{}, error) {
		return struct{}{}, c.driver.disconnect(index, func() error { return c.still(index, use) })
	}, nil)
	if err == nil {
		c.remember(index, use, func(m *memory) { m.disconnected = true })
	}
	return err
}
