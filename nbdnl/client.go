package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
)

// A Client controls the NBD devices of the machine. It may be used by many goroutines at a time.
//
// Keep the Client that connected a device open for as long as the device is to live: present
// kernels do not mind if it closes, but one that disconnects the devices of a closed control socket
// is on its way.
type Client struct {
	sys    System
	sysfs  sysfs
	driver driver
	limit  chan struct{} // holds one element for each command in the kernel
	finder *holder.Finder

	mu           sync.Mutex          // guards the two below
	memories     map[int]memory      // by index
	capabilities map[capability]bool // those that this kernel has been seen to have
}

// New returns a Client for the running kernel. The error matches ErrNoDriver when the kernel offers
// no NBD control: the module is not loaded, or not there.
//
// Where sysfs shows devices New does not ask the kernel, so that what sysfs tells can be had while
// the kernel is stuck in some program's command. Then it is Probe, or the first command, that finds
// out which interface to use: ioctls if netlink is hidden in this network namespace. For a System
// whose Mode is ModeNetlink its error then matches ErrNoDriver.
//
// A Client needs no privilege to look at devices. To change them it needs CAP_SYS_ADMIN in the
// initial user namespace; without, the error matches os.ErrPermission.
func New() (*Client, error) { return System{}.NewClient() }

// NewClient returns a Client for the system, as New does for the running one.
func (s System) NewClient() (*Client, error) {
	c := &Client{
		sys:          s,
		limit:        make(chan struct{}, maxCommands),
		memories:     make(map[int]memory),
		capabilities: make(map[capability]bool),
	}
	c.sysfs = newSysfs(&c.sys)
	c.driver = c.sys.newDriver()
	c.finder = c.sys.Holders()
	c.finder.Keeps = c.driver.serves
	if c.shown() {
		return c, nil
	}
	// From Linux 6.12 on the search loads the module, whose devices then show.
	if err := c.Probe(context.Background()); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close releases the Client. Devices stay as they are, but for those that it has connected by
// ioctls, which it disconnects, without writing what is cached; for a server that does not read it
// waits two seconds. It does not wait for commands that are still in the kernel after their context
// ended, which release what they use when the kernel comes back.
func (c *Client) Close() error { return newError("close", anyIndex, c.driver.close()) }

// Mode returns the interface by which the Client connects devices: ModeNone as long as that is not
// decided, which the first command does, or Probe. Devices that are connected by ioctls end with
// Close.
func (c *Client) Mode() Mode { return c.driver.mode() }

// Holders returns what finds out who uses devices of the Client's system. It knows also which
// descriptor keeps a device connected that this Client has connected by ioctls, on any kernel and
// in any namespace. Calls at the same time, those of Detach included, share their looks at all
// processes.
func (c *Client) Holders() *holder.Finder { return c.finder }

// Claims returns the directory in which Detach claims indexes, and in which those who share the
// Client should meet others.
func (c *Client) Claims() claim.Dir { return c.sys.Claims() }

// Connect makes the kernel choose a free device, or create one, and connects it. By ioctls it
// chooses one itself, and the error matches ErrBusy if none is free. When it returns without an
// error the device is usable and is what cfg requires. A device that this kernel makes otherwise is
// disconnected again, and the error is an *UnsupportedError, or several that are joined.
//
// When ctx ends first, a device that has come into being all the same is disconnected again: before
// Connect returns if the kernel answers within two seconds, later if not.
func (c *Client) Connect(ctx context.Context, cfg Config) (int, error) {
	index, err := c.connect(ctx, anyIndex, cfg)
	if err != nil {
		return anyIndex, newError("connect", anyIndex, err)
	}
	return index, nil
}

// ConnectIndex is like Connect for the device with that index, which is created if it does not
// exist. The error matches ErrBusy when it is in use. A device that is not connected but merely
// open, as by udev after a disconnect, is tried again for a few seconds, and then the error is a
// *BusyError.
func (c *Client) ConnectIndex(ctx context.Context, index int, cfg Config) error {
	if index < 0 || index > maxIndex {
		return newError("connect", index, fmt.Errorf("index is not within 0 and %d: %w", maxIndex, os.ErrInvalid))
	}
	pause := backoff.New()
	defer pause.Stop()
	for begin := time.Now(); ; {
		_, err := c.connect(ctx, index, cfg)
		if !errors.Is(err, syscall.EBUSY) {
			return newError("connect", index, err)
		}
		// For EBUSY the kernel has not touched the sockets.
		use, useErr := c.sysfs.Use(index)
		if use.Connected {
			return newError("connect", index, fmt.Errorf("%w: it is connected already", err))
		}
		holders, _ := c.finder.Find(context.WithoutCancel(ctx), index) // who they are is known or not
		busy := fmt.Errorf("%w: %w", &BusyError{Index: index, Holders: holders}, err)
		if useErr != nil || time.Since(begin) >= patience(holders, connectPatience) {
			return newError("connect", index, busy)
		}
		if err := pause.Wait(ctx, nil); err != nil {
			return newError("connect", index, fmt.Errorf("%w; waiting for that to change: %w", busy, err))
		}
	}
}

// answerGrace is how long a command whose context has ended waits for the kernel's answer: a
// connect in order to have undone it when it returns, a reconfigure to know what became of the
// sockets.
const answerGrace = 2 * time.Second

func (c *Client) connect(ctx context.Context, index int, cfg Config) (int, error) {
	if err := cfg.validate(); err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if err := c.reach(ctx); err != nil {
		return 0, err
	}
	if err := c.sysfs.Visible(); err != nil {
		return 0, fmt.Errorf("what becomes of a device can't be seen: %w", err)
	}
	if err := c.removable(index, cfg.ClientFlags); err != nil {
		return 0, err
	}
	later, cancel := delayed(ctx, answerGrace)
	defer cancel()
	connected, err := do(later, c.limit, func() (int, error) {
		fds, err := dupSockets(cfg.Sockets)
		if err != nil {
			return 0, err
		}
		defer closeAll(fds)
		index, err := c.driver.connect(index, &cfg, fds)
		if errors.Is(err, errAnswerLost) {
			return c.findIdentifier(cfg.Identifier, err)
		}
		return index, explainConnect(err, &cfg)
	}, func(index int, err error) {
		if err == nil {
			// Nobody is there to hear of an error; the device shows as connected.
			_ = c.undoConnect(context.WithoutCancel(ctx), index, cfg.Identifier)
		}
	})
	if err != nil {
		return 0, err
	}
	err = context.Cause(ctx)
	if err == nil {
		err = c.examine(connected, &cfg)
	}
	if err != nil {
		return 0, errors.Join(err, c.undoConnect(later, connected, cfg.Identifier))
	}
	return connected, nil
}

// removable refuses devices that go with their last user, where the next connect of their index may
// sleep for ever in the kernel, and all of generic netlink with it: nbd_genl_connect waits for
// their end under its lock in Linux 5.10, and does not in 6.1.
func (c *Client) removable(index int, flags ClientFlags) error {
	if flags&DestroyOnDisconnect == 0 || c.sysfs.Identifiers {
		return nil
	}
	return &UnsupportedError{Index: index, Setting: "client flags", Want: "DestroyOnDisconnect",
		Reason: "before Linux 5.14 the next connect of the index could hang all of generic netlink"}
}

// findIdentifier returns the index of the device that carries the identifier: it is connected, only
// the kernel did not get its answer through. cause is why.
func (c *Client) findIdentifier(identifier string, cause error) (int, error) {
	if identifier == "" {
		return 0, cause
	}
	indexes, err := c.sysfs.Indexes()
	if err != nil {
		return 0, errors.Join(cause, err)
	}
	for _, index := range indexes {
		if use, err := c.sysfs.Use(index); err == nil && use.Identifier == identifier {
			return index, nil
		}
	}
	return 0, cause
}

// undoConnect disconnects a device that nobody waits for any more. Whoever may be probing it has a
// moment to let go of it.
func (c *Client) undoConnect(ctx context.Context, index int, identifier string) error {
	use, err := c.sysfs.Use(index)
	if err != nil || !use.Connected || use.Identified && use.Identifier != identifier {
		return err // gone already, and perhaps another's by now
	}
	if !use.Identified && c.driver.mode() == ModeIoctl && !c.driver.serves(index) {
		return nil // so it is
	}
	if err := c.disconnect(ctx, index, use); err != nil {
		return err
	}
	return c.waitRelease(ctx, index, use)
}

// explainConnect adds to a refusal what is known of its reason. The kernel itself tells it to no
// more than its log.
func explainConnect(err error, cfg *Config) error {
	switch {
	case errors.Is(err, syscall.EINVAL) && cfg.BlockSize > os.Getpagesize():
		return fmt.Errorf("block size %d is more than this kernel takes (its page size is %d): %w: %w",
			cfg.BlockSize, os.Getpagesize(), errors.ErrUnsupported, err)
	case errors.Is(err, syscall.EINVAL):
		return fmt.Errorf("%w (sockets must be TCP or Unix stream, the index must exist in this driver and "+
			"not be going down; the kernel log has the reason)", err)
	case errors.Is(err, syscall.EPERM):
		return fmt.Errorf("%w (needs CAP_SYS_ADMIN in the initial user namespace)", err)
	}
	return err
}
