package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Indexes returns the indexes of the devices that exist, whatever their state, ascending. It asks
// the kernel nothing.
func (c *Client) Indexes() ([]int, error) {
	indexes, err := c.sysfs.Indexes()
	return indexes, newError("list", anyIndex, err)
}

// AddIndex makes sure that the device with that index exists, as free as others, also beyond those
// that the module has made. Its node in /dev comes a little later where udev makes it. A device
// stays until the module is removed.
//
// The kernel has no command for it. But one that is to connect a device adds it first, and keeps it
// also when it refuses the rest; this one is to be refused, because it asks for blocks that no
// kernel has (nbd_genl_connect, nbd_set_size).
func (c *Client) AddIndex(ctx context.Context, index int) error {
	if index < 0 || index > maxIndex {
		return newError("add", index, fmt.Errorf("index is not within 0 and %d: %w", maxIndex, os.ErrInvalid))
	}
	return newError("add", index, c.addIndex(ctx, index))
}

func (c *Client) addIndex(ctx context.Context, index int) error {
	if err := c.sysfs.Exists(index); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := c.reach(ctx); err != nil {
		return err
	}
	impossible := Config{Size: minBlockSize, BlockSize: 1}
	_, err := do(ctx, c.limit, func() (int, error) { return c.driver.connect(index, &impossible, nil) }, nil)
	if missing := c.sysfs.Exists(index); missing == nil || !errors.Is(missing, os.ErrNotExist) {
		return missing
	}
	if errors.Is(err, syscall.EPERM) {
		return explainConnect(err, &impossible)
	}
	return fmt.Errorf("the kernel does not add it: %w", err)
}

// TryConnectIndex is like ConnectIndex, but makes one attempt: the error matches ErrBusy when the
// device is in use, or merely open. The sockets are as they were then, and good for another
// attempt, at another index too.
func (c *Client) TryConnectIndex(ctx context.Context, index int, cfg Config) error {
	if index < 0 || index > maxIndex {
		return newError("connect", index, fmt.Errorf("index is not within 0 and %d: %w", maxIndex, os.ErrInvalid))
	}
	_, err := c.connect(ctx, index, cfg)
	return newError("connect", index, err)
}
