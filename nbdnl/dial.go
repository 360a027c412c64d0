package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// dialTimeout bounds the search for the driver, which waits behind a command that is stuck in the
// kernel, be it another program's.
const dialTimeout = 10 * time.Second

// errStuck is why a search for the driver is given up.
var errStuck = errors.New("generic netlink does not answer, a command of some program may be stuck in the kernel")

// Probe finds out whether devices can be controlled here, as each command does by itself, and with
// the errors of New. Once the kernel has answered it is not asked again. Probe waits until ctx
// ends, ten seconds at most.
func (c *Client) Probe(ctx context.Context) error { return newError("open", anyIndex, c.reach(ctx)) }

// reach makes sure that the driver has been found, which is put off until the first command: a
// search that is stuck in the kernel keeps the process from exiting, and sysfs needs none. A search
// that failed or was left behind is none; the next command searches anew.
func (c *Client) reach(ctx context.Context) error {
	if c.driver.found() {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, errStuck)
	defer cancel()
	_, err := do(ctx, c.limit, func() (struct{}, error) { return struct{}{}, c.driver.find() }, nil)
	if errors.Is(err, ErrNoDriver) {
		return c.explainNoDriver(err)
	}
	return err
}

// shown reports whether sysfs shows any device, and so that there is a driver.
func (c *Client) shown() bool {
	indexes, _ := c.sysfs.Indexes() // what can't be read does not show
	return len(indexes) > 0
}

// explainNoDriver tells a missing module from one that this network namespace does not see.
func (c *Client) explainNoDriver(err error) error {
	if c.shown() { // and netlink was asked for, or else ioctls would do
		return fmt.Errorf("%w that this network namespace can see: up to Linux 6.1 only the initial one can", err)
	}
	if c.driver.mode() == ModeIoctl {
		return fmt.Errorf(
			"%w: there is no device to make an ioctl on, for the nbd module is not loaded, or with nbds_max=0",
			err,
		)
	}
	return fmt.Errorf("%w: the nbd module is not loaded", err)
}
