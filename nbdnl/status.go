package nbdnl

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// A Status is what the kernel shows of one device at one moment.
type Status struct {
	Index int
	State State
	// Size in bytes; 0 unless connected.
	Size int64
	// BlockSize is the logical block size in bytes. An idle device shows that of its last user.
	BlockSize int
	// Flags are those that the kernel acts upon, as sysfs shows them; 0 unless connected.
	// FlagHasFlags and FlagCanMultiConn don't show. A device may show more than it was connected
	// with: the limits for zeroing and the rotational flag stay from the index's former user up to
	// Linux 7.2.
	Flags Flags
	// ReadOnly stays as it was after a disconnect, until the next connect.
	ReadOnly bool
	// Identifier is the mark that the device was connected with; it may be empty.
	Identifier string
	// HasIdentifier is whether the kernel shows the identifier: netlink devices from Linux 5.14 on.
	HasIdentifier bool
	// OwnerTID is the thread that connected the device, by its number in the initial pid namespace.
	// It may have exited, and the number may be another's by now. 0 is unknown, as before Linux
	// 6.1.
	OwnerTID int
	// OwnerPID is the process that OwnerTID belongs to now; 0 when there is none, or when this
	// process is not in the initial pid namespace.
	OwnerPID int
	// OwnerGone is whether the thread OwnerTID is known to have ended.
	OwnerGone bool
	Mode      Mode
}

// Connected reports whether the device has a configuration, usable or not.
func (s *Status) Connected() bool { return s.State != StateIdle && s.State != StateHeld }

// Status returns the state of a device. It needs no privilege. The error matches os.ErrNotExist
// when there is no such device.
//
// The kernel is asked only for a device that sysfs does not show as connected. When it can't be,
// the Status is that of an idle device, which may then be held, along with the error.
//
// After a disconnect by another process, a device that is still held looks live until it is
// released: the kernel shows no difference.
func (c *Client) Status(ctx context.Context, index int) (Status, error) {
	s, err := c.status(ctx, index)
	return s, newError("status", index, err)
}

// Devices returns the states of all devices that exist, idle ones too, by ascending index. It needs
// no privilege.
//
// When only the kernel's netlink answer is missing, as when it is stuck in another command, or
// hides the driver in this network namespace, the devices are returned along with the error; those
// that seem idle may then be held. After the first answer that is missing the kernel is not asked
// for the others.
func (c *Client) Devices(ctx context.Context) ([]Status, error) {
	devices, err := c.statuses()
	if err != nil {
		return nil, err
	}
	for i := range devices {
		if d := &devices[i]; d.State == StateIdle && err == nil {
			d.State, err = c.idleOrHeld(ctx, d.Index)
		}
	}
	return devices, newError("list", anyIndex, err)
}

// Connected returns the states of the devices that are connected, by ascending index. It needs no
// privilege, and waits for nobody, for sysfs tells it all.
func (c *Client) Connected() ([]Status, error) {
	devices, err := c.statuses()
	return slices.DeleteFunc(devices, func(s Status) bool { return !s.Connected() }), err
}

// statuses reads the status of all devices from sysfs.
func (c *Client) statuses() ([]Status, error) {
	indexes, err := c.sysfs.Indexes()
	if err != nil {
		return nil, newError("list", anyIndex, err)
	}
	devices := make([]Status, 0, len(indexes))
	for _, index := range indexes {
		s, err := c.statusOf(index)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, newError("list", index, err)
		}
		devices = append(devices, s)
	}
	return devices, nil
}

func (c *Client) status(ctx context.Context, index int) (Status, error) {
	s, err := c.statusOf(index)
	if err == nil && s.State == StateIdle {
		s.State, err = c.idleOrHeld(ctx, index)
	}
	return s, err
}

// idleOrHeld asks the kernel whether somebody has a device open that is not connected.
func (c *Client) idleOrHeld(ctx context.Context, index int) (State, error) {
	if err := c.reach(ctx); err != nil {
		return StateIdle, err
	}
	held, err := do(ctx, c.limit, func() (bool, error) { return c.driver.configured(index) }, nil)
	if held {
		return StateHeld, err
	}
	return StateIdle, err
}

// statusOf reads the status from sysfs, where idle and held devices look the same.
func (c *Client) statusOf(index int) (Status, error) {
	s, _, err := c.look(index)
	return s, err
}

// look is statusOf together with the use of the index that the status is of.
func (c *Client) look(index int) (Status, devices.Use, error) {
	for {
		before, err := c.sysfs.Use(index)
		if err != nil {
			return Status{}, devices.Use{}, err
		}
		s, err := c.statusIn(index, before)
		if err != nil {
			return Status{}, devices.Use{}, err
		}
		if !before.Connected {
			return s, before, nil // what little there is, is of no particular use
		}
		// The files are read one after the other, and must all be of one use of the index.
		after, err := c.sysfs.Use(index)
		if err != nil {
			return Status{}, devices.Use{}, err
		}
		if before == after {
			return s, after, nil
		}
	}
}

func (c *Client) statusIn(index int, use devices.Use) (Status, error) {
	block, err := c.sysfs.Number(index, "queue/logical_block_size")
	if err != nil {
		return Status{}, err
	}
	ro, err := c.sysfs.Number(index, "ro")
	if err != nil {
		return Status{}, err
	}
	s := Status{Index: index, BlockSize: int(block), ReadOnly: ro != 0}
	if !use.Connected {
		return s, nil
	}
	if s.Size, err = c.sysfs.Size(index); err != nil {
		return Status{}, err
	}
	if s.Flags, err = c.sysfs.flags(index); err != nil {
		return Status{}, err
	}
	s.Identifier, s.HasIdentifier = use.Identifier, use.Identified
	s.OwnerTID = use.TID
	s.OwnerPID, s.OwnerGone = c.sys.root().ProcessOf(use.TID)
	s.Mode = c.modeOf(index, use)
	switch {
	case c.hasEnded(index, use):
		s.State = StateDisconnecting
	case s.Size == 0:
		// `pid` comes before the size at connect, and goes after it at the end.
		s.State = StateConnecting
	default:
		s.State = StateLive
	}
	return s, nil
}

func (c *Client) modeOf(index int, use devices.Use) Mode {
	switch {
	case use.Identified:
		return ModeNetlink
	case c.sysfs.Identifiers:
		return ModeIoctl
	}
	if m := c.recall(index, use); m.connected {
		return m.mode
	}
	return ModeUnknown
}
