package nbdnl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// An ioctlDriver controls devices by ioctls on their open nodes. Each device that it connects lives
// by a session.
type ioctlDriver struct {
	sys   *System
	sysfs sysfs

	mu       sync.Mutex // guards what follows
	sessions map[int]*session
	closed   bool
}

func newIoctlDriver(s *System) *ioctlDriver {
	return &ioctlDriver{sys: s, sysfs: newSysfs(s), sessions: make(map[int]*session)}
}

func (d *ioctlDriver) mode() Mode { return ModeIoctl }

// find looks for devices: the ioctls come with them.
func (d *ioctlDriver) find() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	indexes, err := d.sysfs.Indexes()
	if err == nil && len(indexes) == 0 {
		err = ErrNoDriver
	}
	return err
}

// found is always false: to look again costs nothing, and the module may have gone.
func (d *ioctlDriver) found() bool { return false }

// errTaken means that somebody else uses a device that was to be connected, whose sockets are
// untouched. It is what the netlink driver's kernel says.
var errTaken error = syscall.EBUSY

// errUnopened means that the node of a device that was to be connected can't be opened, and nothing
// else is known of it.
var errUnopened = errors.New("its node can't be opened")

func (d *ioctlDriver) connect(index int, cfg *Config, fds []int) (int, error) {
	wanted := &Update{DeadConnTimeout: &cfg.DeadConnTimeout, ClientFlags: &cfg.ClientFlags}
	if err := ioctlLacks(index, wanted, 0); err != nil {
		return 0, err
	}
	if index != anyIndex {
		return index, d.start(index, cfg, fds)
	}
	indexes, err := d.sysfs.Indexes()
	if err != nil {
		return 0, err
	}
	var closed error
	for _, index := range indexes {
		err := d.startClaimed(index, cfg, fds)
		switch {
		case errors.Is(err, errTaken):
		case errors.Is(err, errUnopened):
			// A container may have the nodes of some devices only.
			closed = cmp.Or(closed, err)
		default:
			return index, err
		}
	}
	if closed != nil {
		return 0, fmt.Errorf("no device is free that can be opened: %w", closed)
	}
	return 0, fmt.Errorf(
		"%w: all %d devices are in use, and ioctls make no new ones (the module's parameter nbds_max does)",
		ErrBusy, len(indexes),
	)
}

// startClaimed starts an idle device that nobody claims. Who loses the race for a device by ioctls
// may not know it, and end the winner's; claims keep those apart who ask for them.
func (d *ioctlDriver) startClaimed(index int, cfg *Config, fds []int) error {
	if use, err := d.sysfs.Use(index); err != nil || use.Connected {
		return errors.Join(err, errTaken)
	}
	claimed, err := d.sys.Claims().TryClaim(index)
	if errors.Is(err, claim.ErrBusy) {
		return errTaken
	}
	if err != nil {
		return err
	}
	err = d.start(index, cfg, fds)
	// The claim is given up in any case, for its file is closed; and the device is there.
	_ = claimed.Release()
	return err
}

// start connects a device, and returns when the kernel shows it.
func (d *ioctlDriver) start(index int, cfg *Config, fds []int) error {
	if err := d.sysfs.Exists(index); err != nil {
		return fmt.Errorf("%w (only netlink makes new devices)", err)
	}
	own, err := dupDescriptors(fds)
	if err != nil {
		return err
	}
	s := &session{
		driver:  d,
		index:   index,
		cfg:     cfg,
		sockets: own,
		begun:   make(chan struct{}),
		done:    make(chan struct{}),
	}
	if err := d.add(s); err != nil {
		closeAll(own)
		return err
	}
	go ownThread(s.run)
	if err := s.wait(); err != nil {
		return errors.Join(err, s.end())
	}
	return nil
}

// add makes s the session of its index.
func (d *ioctlDriver) add(s *session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return os.ErrClosed
	case d.sessions[s.index] != nil:
		return errTaken
	}
	d.sessions[s.index] = s
	return nil
}

func (d *ioctlDriver) remove(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.sessions, s.index)
}

func (d *ioctlDriver) session(index int) *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sessions[index]
}

func (d *ioctlDriver) serves(index int) bool { return d.session(index) != nil }

// disconnect does what nbd_disconnect_and_put does. The device can't become another while it is
// open, so that what still says holds until the end.
func (d *ioctlDriver) disconnect(index int, still func() error) error {
	if s := d.session(index); s != nil {
		if err := still(); err != nil {
			return err
		}
		return s.disconnect()
	}
	dev, err := d.sys.open(index, os.O_RDONLY)
	if err != nil {
		return err
	}
	if err = still(); err == nil {
		err = d.sys.disconnect(dev)
	}
	return errors.Join(err, dev.Close())
}

// disconnect ends the configuration of the open device, whoever has made it, by ioctls or by
// netlink.
func (s *System) disconnect(dev Device) error {
	return errors.Join(
		s.ioctl(dev, ioctlDisconnect, 0),
		// The first leaves the rest to the server, which is to close the connections.
		s.clear(dev),
	)
}

// clear cuts the connections of the open device, and ends what is in flight.
func (s *System) clear(dev Device) error { return s.ioctl(dev, ioctlClearSock, 0) }

// reconfigure changes a device of this driver's. It knows no others.
func (d *ioctlDriver) reconfigure(index int, _ string, u *Update, fds []int) error {
	if err := ioctlLacks(index, u, len(fds)); err != nil {
		return err
	}
	s := d.session(index)
	if s == nil {
		return ErrNotConnected
	}
	select {
	case <-s.begun:
		return s.set(u)
	case <-s.done:
		return ErrNotConnected
	}
}

// ioctlLacks returns what an update has, with so many sockets, that there are no ioctls for: one or
// more *UnsupportedError, or nil.
func ioctlLacks(index int, u *Update, sockets int) error {
	var errs []error
	lack := func(setting string, want any, reason string) {
		errs = append(errs, &UnsupportedError{Index: index, Setting: setting, Want: fmt.Sprint(want), Reason: reason})
	}
	if sockets > 0 {
		lack("replacing connections", sockets, "a device connected by ioctls ends when its last connection dies")
	}
	if t := u.DeadConnTimeout; t != nil && *t != 0 {
		lack("dead connection timeout", *t,
			"there is no ioctl for it, nor for a new connection that requests could wait for")
	}
	if f := u.ClientFlags; f != nil && *f != 0 {
		lack("client flags", fmt.Sprintf("%#x", uint64(*f)), "there is no ioctl for them")
	}
	return errors.Join(errs...)
}

// configured goes by who has the device open, as far as that can be seen: there is no ioctl that
// would not have to open it first.
func (d *ioctlDriver) configured(index int) (bool, error) {
	holders, err := d.sys.Holders().Find(context.Background(), index)
	return len(holders) > 0, err
}

func (d *ioctlDriver) deaths() (deathSource, error) { return silence{make(chan struct{})}, nil }

// A silence is a source that tells of nothing: only netlink does.
type silence struct{ closed chan struct{} }

func (s silence) Read() (int, error) { <-s.closed; return anyIndex, os.ErrClosed }
func (s silence) Join() error        { return nil }
func (s silence) Close() error       { close(s.closed); return nil }

// close ends all sessions, since a device whose thread nobody owns can't be ended in order any
// more.
func (d *ioctlDriver) close() error {
	d.mu.Lock()
	d.closed = true
	var left []*session
	for _, s := range d.sessions {
		left = append(left, s)
	}
	d.mu.Unlock()
	errs := make(chan error, len(left))
	for _, s := range left {
		go func() { errs <- s.end() }()
	}
	var all []error
	for range left {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// ioctlSizes returns the requests that set a size and a block size, in that order. There is one for
// the size in bytes too, in which 32-bit systems have room for 4 GiB.
func ioctlSizes(size int64, block int) ([]ioctlRequest, error) {
	blocks := uint64(size) / uint64(block)
	if blocks > uint64(^uintptr(0)) || blocks > math.MaxInt64/uint64(block) {
		return nil, fmt.Errorf(
			"size %d is more than %d-byte blocks can be counted of here: %w",
			size, block, errors.ErrUnsupported,
		)
	}
	return []ioctlRequest{
		{ioctlSetBlockSize, uintptr(block), "block size"},
		{ioctlSetSizeBlocks, uintptr(blocks), "size"},
	}, nil
}

// An ioctlRequest is one ioctl and what it sets.
type ioctlRequest struct {
	request, arg uintptr
	what         string
}

// send makes the requests one after the other.
func (s *System) send(dev Device, requests []ioctlRequest) error {
	for _, r := range requests {
		if err := s.ioctl(dev, r.request, r.arg); err != nil {
			return fmt.Errorf("%s %d: %w", r.what, r.arg, err)
		}
	}
	return nil
}
