package nbdnl

import (
	"errors"
	"sync/atomic"
)

// A driver is a way to give commands to the kernel. Its methods block for as long as the kernel
// does, which may be for ever, and may be called concurrently.
type driver interface {
	// mode is the way, or ModeNone as long as that is not decided.
	mode() Mode
	// find looks for the driver in the kernel, and found tells, without asking the kernel, whether
	// one such search has succeeded. The commands below need one that has.
	find() error
	found() bool
	// connect configures the device with that index, or one of the kernel's choice for anyIndex,
	// and returns its index. The kernel takes its own references to fds.
	connect(index int, cfg *Config, fds []int) (int, error)
	// disconnect ends the device, unless still says, right before, that it is another by now.
	disconnect(index int, still func() error) error
	reconfigure(index int, identifier string, u *Update, fds []int) error
	// serves reports whether the device lives by a thread of this driver.
	serves(index int) bool
	// deaths opens what the kernel says of connections that died.
	deaths() (deathSource, error)
	// configured reports whether the device has a configuration, which each opener makes too.
	configured(index int) (bool, error)
	close() error
}

// newDriver returns the system's driver.
func (s *System) newDriver() driver {
	switch s.Mode {
	case ModeNetlink:
		return &netlinkDriver{dial: s.dial}
	case ModeIoctl:
		return newIoctlDriver(s)
	}
	return &anyDriver{netlink: &netlinkDriver{dial: s.dial}, ioctl: newIoctlDriver(s)}
}

// An anyDriver is the netlink driver, or the one for ioctls where the kernel has devices but does
// not show its netlink family.
type anyDriver struct {
	netlink *netlinkDriver
	ioctl   *ioctlDriver
	fallen  atomic.Bool // back to ioctls, for good: a thread does not change its network namespace
}

func (d *anyDriver) current() driver {
	if d.fallen.Load() {
		return d.ioctl
	}
	return d.netlink
}

func (d *anyDriver) mode() Mode {
	if !d.found() {
		return ModeNone
	}
	return d.current().mode()
}

func (d *anyDriver) find() error {
	err := d.netlink.find()
	if errors.Is(err, ErrNoDriver) && d.ioctl.find() == nil {
		d.fallen.Store(true)
		return nil
	}
	return err
}

func (d *anyDriver) found() bool { return d.netlink.found() || d.fallen.Load() }

func (d *anyDriver) connect(index int, cfg *Config, fds []int) (int, error) {
	return d.current().connect(index, cfg, fds)
}

func (d *anyDriver) disconnect(index int, still func() error) error {
	return d.current().disconnect(index, still)
}

func (d *anyDriver) reconfigure(index int, identifier string, u *Update, fds []int) error {
	return d.current().reconfigure(index, identifier, u, fds)
}

func (d *anyDriver) serves(index int) bool { return d.ioctl.serves(index) }

func (d *anyDriver) deaths() (deathSource, error) { return d.current().deaths() }

func (d *anyDriver) configured(index int) (bool, error) { return d.current().configured(index) }

func (d *anyDriver) close() error { return errors.Join(d.netlink.close(), d.ioctl.close()) }
