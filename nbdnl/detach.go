package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// DetachOptions say which device Detach may take, and at what price.
type DetachOptions struct {
	// Identifier is the one that the device must carry.
	Identifier string
	// Any leaves the identifier out of account.
	Any bool
	// Incarnation, unless it is 0, is that of the device which the caller has made sure to be the
	// one: when its index is used anew, the device is not connected any more. It is for devices
	// without an identifier.
	Incarnation Incarnation
	// Force detaches the device although somebody uses it, or although writing what is cached does
	// not end: those who use it get I/O errors from then on, a file system above loses what it had
	// not written.
	Force bool
	// Dead says that the device's server is gone for good. What is cached is then given up, since
	// there is nobody to write it to; those who use the device are respected all the same.
	Dead bool
	// Server is the process that serves a device connected by ioctls. It has the device open,
	// without which the device would not be, and that does not count as use. It need be given only
	// where the kernel does not tell: before Linux 6.1, or from another pid namespace than the
	// initial one.
	Server int

	keeper holder.Descriptor // Server's, set by detach
}

// Detach disconnects a device in good order: it makes sure that the device is the caller's and that
// nobody uses it, writes what is cached, disconnects, and waits until the index is free. It claims
// the index meanwhile (see package claim), so the caller must not.
//
// The error matches os.ErrNotExist, ErrNotConnected, ErrNotOwner (see Drop), or is a *BusyError;
// the device then is as it was. It also is as it was when writing what is cached has not come to an
// end. With Force those two go on, and what was lost is reported, with a *BusyError that says
// Disconnected when the holders keep the index from becoming free.
//
// An error that matches ErrNotWritten tells that the server did not take some of the cached data.
// The kernel drops what it could not write, and tells only the first who syncs after that, so to
// keep the device would save nothing: it is disconnected all the same, unless the error is another
// one, too.
//
// It looks for those who use the device in all processes, before it opens the device and once more
// when what was cached is written. Calls at the same time share these looks, so that many devices
// at once take little longer than one.
//
// Each step ends with ctx. A step that the kernel or the device's server blocks is then left behind
// in a goroutine, which ends when the device's requests do.
func (c *Client) Detach(ctx context.Context, index int, o DetachOptions) error {
	return newError("detach", index, c.detach(ctx, index, o))
}

func (c *Client) detach(ctx context.Context, index int, o DetachOptions) (err error) {
	claimed, err := c.sys.Claims().Claim(ctx, index)
	switch {
	case err == nil:
		defer func() { err = errors.Join(err, claimed.Release()) }()
	case !o.Force || ctx.Err() != nil:
		return err
	default:
		// A state directory that is full or read-only must not make a device immortal. What claims
		// keep apart are two that do this at once, and the identifier does too.
	}

	use, err := c.useFor(index, o)
	if err != nil {
		return err
	}
	if !use.Identified && !c.driver.serves(index) { // netlink keeps no device open
		o.keeper = holder.Descriptor{PID: o.Server, FD: holder.AnyFD}
	}
	opened, lost, err := c.flush(ctx, index, o)
	defer opened.close()
	if err != nil && (!o.Force || ctx.Err() != nil) {
		return errors.Join(fmt.Errorf("%w; it was not disconnected", err), lost)
	}
	lost = errors.Join(err, lost)
	bounded, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	if err := c.disconnect(bounded, index, use); err != nil {
		return errors.Join(err, lost)
	}
	// While it is open the kernel keeps the device as it was.
	opened.close()
	if err := c.waitRelease(ctx, index, use); err != nil {
		return errors.Join(err, lost)
	}
	c.dropPartitions(ctx, index)
	if lost != nil {
		return fmt.Errorf("disconnected, but %w", lost)
	}
	return nil
}

// useFor returns the present use of the index if it is one that the options mean.
func (c *Client) useFor(index int, o DetachOptions) (devices.Use, error) {
	if !o.Any {
		return c.owned(index, o.Identifier)
	}
	use, err := c.connected(index)
	if err == nil && o.Incarnation != 0 && use.Incarnation != o.Incarnation {
		err = fmt.Errorf("%w any more: its index is used anew", ErrNotConnected)
	}
	return use, err
}

// flush opens the device, exclusively unless that is to be forced, and writes what is cached. It
// returns the device, if it could be opened, what can't be written any more, and why the device
// should be left as it is.
func (c *Client) flush(ctx context.Context, index int, o DetachOptions) (opened *seizure, lost, err error) {
	opened, err = c.seize(ctx, index, o)
	if err != nil || opened.dev == nil {
		return opened, nil, err
	}
	own := opened.descriptor() // now: a sync that does not come to an end keeps it
	err = opened.sync(ctx, o.Force || o.Dead)
	switch {
	case err == nil || o.Dead:
	case opened.dev == nil && (!o.Force || ctx.Err() != nil): // The sync goes on, and may yet write all.
		return opened, nil, fmt.Errorf("cached data is not written yet: %w", err)
	default:
		// The kernel tries every page once, and has none left that waits: one whose write failed is
		// clean (end_buffer_async_write, or end_bio_bh_io_sync before it, in fs/buffer.c).
		lost = fmt.Errorf("%w: %w", ErrNotWritten, err)
	}
	if o.Force {
		return opened, lost, nil
	}
	// The write may have taken long enough for somebody to open the device.
	return opened, lost, c.vacant(ctx, index, o.keeper, own)
}

// seize opens the device, exclusively unless that is to be forced.
func (c *Client) seize(ctx context.Context, index int, o DetachOptions) (*seizure, error) {
	if !o.Force {
		// It takes as long as it takes to look at all processes, and needs no server.
		if err := c.vacant(ctx, index, o.keeper); err != nil {
			return &seizure{}, err
		}
	}
	opening := ctx
	if o.Force || o.Dead {
		var cancel context.CancelFunc
		opening, cancel = withPatience(ctx, forcePatience)
		defer cancel()
	}
	dev, err := c.openVacant(opening, index, o.keeper)
	busy := errors.Is(err, ErrBusy)
	switch {
	case busy && o.Force:
		dev, err = c.open(opening, index, os.O_RDONLY)
	case busy:
		return &seizure{}, err
	}
	if err != nil && o.Dead {
		return &seizure{}, nil // without a server a device may not even open
	}
	return &seizure{dev: dev}, err
}

// OpenExclusive opens a device that nobody uses, and keeps new mounts and their like out until it
// is closed. Before, it looks for those who use the device in all processes. For processes that may
// let go of it it waits as Detach does: fifteen seconds for udev, which looks at every device that
// changes, and one second for others. Then the error is a *BusyError.
//
// To open a device can take as long as its server does, which the partition table is read from.
// When ctx ends first, the device is closed as soon as it is open.
func (c *Client) OpenExclusive(ctx context.Context, index int) (Device, error) {
	err := c.vacant(ctx, index)
	var dev Device
	if err == nil {
		dev, err = c.openVacant(ctx, index)
	}
	return dev, newError("open", index, err)
}

// openVacant opens the device exclusively, so that nothing can be mounted on it from here on.
// Read-only is enough to fsync, and does not make udev probe the device again when it is closed, as
// the end of a write does.
func (c *Client) openVacant(ctx context.Context, index int, except ...holder.Descriptor) (Device, error) {
	dev, err := c.open(ctx, index, os.O_RDONLY|syscall.O_EXCL)
	if !errors.Is(err, syscall.EBUSY) {
		return dev, err
	}
	holders, _ := c.finder.Find(context.WithoutCancel(ctx), index, except...)
	if len(holders) == 0 {
		holders = []holder.Holder{{Kind: holder.Exclusive, Device: name(index)}}
	}
	return nil, &BusyError{Index: index, Holders: holders}
}

// vacant waits a little until nobody holds the device, but for some descriptors.
func (c *Client) vacant(ctx context.Context, index int, except ...holder.Descriptor) error {
	pause := backoff.New()
	defer pause.Stop()
	var busy *BusyError
	var found time.Time // when somebody was found: to look may itself take long
	for {
		holders, err := c.finder.Find(ctx, index, except...)
		switch {
		case err != nil && busy != nil && ctx.Err() != nil:
			return fmt.Errorf("%w; waiting for that to change: %w", busy, err)
		case err != nil || len(holders) == 0:
			return err
		case busy == nil:
			found = time.Now()
		}
		busy = &BusyError{Index: index, Holders: holders}
		if time.Since(found) >= patience(holders, detachPatience) {
			return busy
		}
		if err := pause.Wait(ctx, nil); err != nil {
			return fmt.Errorf("%w; waiting for that to change: %w", busy, err)
		}
	}
}

// open opens the device node. That can take for as long as the device's server does not answer,
// since the first open after a connect reads the partition table.
func (c *Client) open(ctx context.Context, index, flag int) (Device, error) {
	return do(ctx, nil,
		func() (Device, error) { return c.sys.open(index, flag) },
		func(d Device, err error) {
			if err == nil {
				_ = d.Close() // nothing was written
			}
		})
}

// waitRelease waits a little until the disconnected device is released.
func (c *Client) waitRelease(ctx context.Context, index int, use devices.Use) error {
	begin := time.Now()
	for limit := releasePatience; ; limit = proberPatience {
		patient, cancel := context.WithDeadline(ctx, begin.Add(limit))
		err := c.waitEnd(patient, index, use)
		expired := ctx.Err() == nil && patient.Err() != nil
		cancel()
		if err == nil || !expired {
			return err
		}
		holders, _ := c.finder.Find(context.WithoutCancel(ctx), index) // who they are is known or not
		if time.Since(begin) >= patience(holders, releasePatience) {
			return &BusyError{Index: index, Holders: holders, Disconnected: true}
		}
	}
}

// dropPartitions makes the kernel forget the partitions, which outlive a disconnect until the next
// open of the whole disk. Should that fail, they are forgotten when somebody else opens it.
func (c *Client) dropPartitions(ctx context.Context, index int) {
	partitions, err := c.sysfs.Partitions(index)
	if err != nil || len(partitions) == 0 {
		return
	}
	if use, err := c.sysfs.Use(index); err != nil || use.Connected {
		return // somebody who does not claim has connected it
	}
	if dev, err := c.open(ctx, index, os.O_RDONLY); err == nil {
		_ = dev.Close() // nothing was written
	}
}

// A seizure is the device while Detach has it open. The zero value is closed.
type seizure struct{ dev Device }

// sync writes what is cached. When it does not come to an end in time, the device is closed once it
// does.
func (s *seizure) sync(ctx context.Context, force bool) error {
	if force {
		var cancel context.CancelFunc
		ctx, cancel = withPatience(ctx, forcePatience)
		defer cancel()
	}
	dev := s.dev
	_, err := do(ctx, nil,
		func() (struct{}, error) { return struct{}{}, dev.Sync() },
		func(struct{}, error) { _ = dev.Close() }) // that it can't be synced has been reported
	if errors.Is(err, errNoAnswer) {
		s.dev = nil
	}
	return err
}

// descriptor returns the descriptor that the device is open as.
func (s *seizure) descriptor() holder.Descriptor {
	conn, ok := s.dev.(syscall.Conn)
	if !ok {
		return holder.Descriptor{}
	}
	var d holder.Descriptor
	if raw, err := conn.SyscallConn(); err == nil {
		// It can't fail: the device is open until it is closed here.
		_ = raw.Control(func(fd uintptr) { d = holder.Descriptor{PID: os.Getpid(), FD: int(fd)} })
	}
	return d
}

// close closes the device. The kernel has nothing to say to that: what can fail was synced.
func (s *seizure) close() {
	if s.dev != nil {
		_ = s.dev.Close()
		s.dev = nil
	}
}

// withPatience returns a context that ends after d, or after half of the time that ctx has left, so
// that time remains for what follows.
func withPatience(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		d = min(d, time.Until(deadline)/2)
	}
	return context.WithTimeout(ctx, d)
}
