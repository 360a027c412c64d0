package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// WaitFree returns when the present use of the index has ended: when the device is not connected, or is
// so anew by another. A disconnected device stays as it was for as long as somebody has it open.
//
// The index may still not be free for the next ConnectIndex, if somebody opens it while it is idle.
func (c *Client) WaitFree(ctx context.Context, index int) error {
	l, err := c.sysfs.life(index)
	if err == nil && l.connected {
		err = c.waitEnd(ctx, index, l)
	}
	return newError("wait", index, err)
}

// waitEnd waits until l is over.
func (c *Client) waitEnd(ctx context.Context, index int, l life) error {
	over := func() (bool, error) {
		now, err := c.sysfs.life(index)
		if errors.Is(err, os.ErrNotExist) {
			return true, nil
		}
		return now != l, err
	}
	if end, err := over(); end || err != nil {
		return err
	}
	w := c.sys.watch(index)
	defer w.close()
	pause := newBackoff()
	defer pause.stop()
	for {
		end, err := over()
		if end || err != nil {
			return err
		}
		// nbd_config_put removes `pid` only after it has sent its event, so that an event is a reason
		// to look, more than once.
		if err := pause.wait(ctx, w.changed); err != nil {
			return fmt.Errorf("it is still held: %w", err)
		}
	}
}
