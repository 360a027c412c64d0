package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// WaitFree returns when the present use of the index has ended: when the device is not connected,
// or is so anew by another. A disconnected device stays as it was for as long as somebody has it
// open.
//
// The index may still not be free for the next ConnectIndex, if somebody opens it while it is idle.
func (c *Client) WaitFree(ctx context.Context, index int) error {
	use, err := c.sysfs.Use(index)
	if err == nil && use.Connected {
		err = c.waitEnd(ctx, index, use)
	}
	return newError("wait", index, err)
}

// waitEnd waits until use is over.
func (c *Client) waitEnd(ctx context.Context, index int, use devices.Use) error {
	over := func() (bool, error) {
		now, err := c.sysfs.Use(index)
		if errors.Is(err, os.ErrNotExist) {
			return true, nil
		}
		return now != use, err
	}
	if end, err := over(); end || err != nil {
		return err
	}
	w := c.sys.watch(index)
	defer w.close()
	pause := backoff.New()
	defer pause.Stop()
	for {
		end, err := over()
		if end || err != nil {
			return err
		}
		// nbd_config_put removes `pid` only after it has sent its event, so that an event is a
		// reason to look, more than once.
		if err := pause.Wait(ctx, w.changed); err != nil {
			return fmt.Errorf("it is still held: %w", err)
		}
	}
}

// WaitReady returns when everybody can use the device: it is connected, its size shows, its node
// can be opened, and its partitions, whose names ("nbd3p1") it returns, are there. The kernel looks
// for them within the first open after a connect or a resize, which this is if nobody was quicker,
// and reads from the server for it. Sockets of the caller's must be served meanwhile.
//
// The error matches os.ErrNotExist or ErrNotConnected. WaitReady waits until ctx ends, also where
// the server does not answer. It needs the right to open the device.
func (c *Client) WaitReady(ctx context.Context, index int) ([]string, error) {
	partitions, err := c.waitReady(ctx, index)
	return partitions, newError("wait", index, err)
}

func (c *Client) waitReady(ctx context.Context, index int) ([]string, error) {
	w := c.sys.watch(index)
	defer w.close()
	pause := backoff.New()
	defer pause.Stop()
	for {
		ready, err := c.ready(ctx, index)
		if err != nil {
			return nil, err
		}
		if ready {
			return c.sysfs.Partitions(index)
		}
		if err := pause.Wait(ctx, w.changed); err != nil {
			return nil, fmt.Errorf("it is not ready yet: %w", err)
		}
	}
}

// ready opens the device, unless it is still being made.
func (c *Client) ready(ctx context.Context, index int) (bool, error) {
	if _, err := c.connected(index); err != nil {
		return false, err
	}
	if size, err := c.sysfs.Size(index); err != nil || size == 0 {
		return false, err // `pid` comes before the size (nbd_start_device)
	}
	dev, err := c.open(ctx, index, os.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // it is for udev to make the node
	}
	if err != nil {
		return false, err
	}
	return true, dev.Close()
}
