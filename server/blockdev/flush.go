package blockdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Flush writes what the kernel holds back of the device, and returns when the backend has all of it
// and its Sync has returned: what is cached of the device, its partitions, and all block devices
// that stand on them (device mapper with LVM and dm-crypt, md, bcache, loop devices, one on the
// other), and what file systems on any of these have not written yet, in whatever mount namespace.
// Each needs its node in /dev; if that does not appear within 5 seconds, the error names it, and
// matches os.ErrNotExist.
//
// Of a btrfs all is written, on whichever of its devices. Flush does not reach another file system
// that has only its journal here, nor image files in a file system that are in use in turn; nor
// does it empty a cache that a layer above keeps elsewhere on purpose, as bcache and dm-writecache
// do. While it is at work the devices above can't be removed, nor a btrfs unmounted.
//
// The error is also of what went wrong before. The kernel acknowledges a write when it is cached;
// if the backend fails it later, the next to sync gets an error, who need not be the one that
// wrote, and after an unmount nobody does. Here the owner does: the error matches a *LossError,
// which has the first of the requests that were not executed, or says that there was no connection
// to send them over. Each Flush tells it again, and Disconnect and Close do, until it is
// acknowledged by its Number (see Acknowledge). The device goes on.
//
// The error matches nbdnl.ErrNotConnected if the device has ended; another one that has the index
// since is not touched. If ctx ends first, Flush returns, and goes on in the background until the
// backend answers or the device ends; Disconnect may find the device in use by it.
func (d *Device) Flush(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return d.withLoss(d.flush(ctx))
}

func (d *Device) flush(ctx context.Context) error {
	select {
	case <-d.conns.done:
		return fmt.Errorf("blockdev: %s has ended: %w", d.Path(), nbdnl.ErrNotConnected)
	default:
	}
	result := make(chan error, 1)
	go func() {
		unwritten, err := d.machine.flush(ctx, d.index, d.incarnation)
		if unwritten != nil && !errors.Is(err, nbdnl.ErrNotConnected) {
			d.losses.unwritten(unwritten) // Also if nobody waits any more: the kernel does not say it again.
		}
		if err == nil {
			err = unwritten // as it is, for withLoss to find
		} else {
			err = errors.Join(err, unwritten)
		}
		result <- err
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s: what is cached is not written yet: %w", d.Path(), context.Cause(ctx))
	}
}

// flush writes what the kernel holds back of the device that index was in that incarnation, and
// nothing of another one that has the index since. It takes as long as the kernel does; ctx bounds
// the wait for device nodes only. unwritten is what the kernel could not write, err is what else
// went wrong.
func (m machine) flush(ctx context.Context, index int, incarnation nbdnl.Incarnation) (unwritten, err error) {
	path := nbdnl.Path(index)
	ended := fmt.Errorf("blockdev: %s is not the device any more that it was: %w", path, nbdnl.ErrNotConnected)
	disk, ok := m.disk(index, incarnation)
	if !ok {
		return nil, ended
	}
	// While it is open, the kernel gives the index to nobody else.
	dev, err := m.openLayer(ctx, disk)
	if err != nil {
		return nil, fmt.Errorf("blockdev: what is cached was not written: %w", err)
	}
	if dev == nil {
		return nil, ended
	}
	unwritten, err = m.flushStack(ctx, disk, dev)
	if !disk.there() {
		err = errors.Join(ended, err)
	}
	return unwritten, errors.Join(err, dev.Close())
}

// flushStack writes what is cached of an open disk and of all that stands on it. What fails keeps
// nothing else from being written.
func (m machine) flushStack(ctx context.Context, disk layer, dev nbdnl.Device) (unwritten, failed error) {
	layers, failed := m.stackOn(disk)
	if failed != nil {
		failed = fmt.Errorf("blockdev: what stands on %s can't be told: %w", disk.name, failed)
	}
	if err := m.syncBtrfs(layers); err != nil {
		err = fmt.Errorf("blockdev: what a file system keeps back from %s was not written: %w", disk.name, err)
		failed = errors.Join(failed, err)
	}
	for _, l := range layers {
		var unsynced, err error
		if l.name == disk.name { // The last: its sync is the one that makes the backend's Sync cover the others.
			unsynced = syncAll(dev)
		} else {
			unsynced, err = m.flushLayer(ctx, l)
		}
		unwritten = errors.Join(unwritten, notWritten(l, unsynced))
		failed = errors.Join(failed, notWritten(l, err))
	}
	return unwritten, failed
}

// notWritten says of which layer an error is, if it is one.
func notWritten(l layer, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("blockdev: what is cached of %s was not written: %w", l.name, err)
}

func (m machine) flushLayer(ctx context.Context, l layer) (unwritten, err error) {
	dev, err := m.openLayer(ctx, l)
	if dev == nil || err != nil {
		return nil, err
	}
	return syncAll(dev), dev.Close()
}

// syncAll writes what is cached of an open device, by a file system first.
func syncAll(dev nbdnl.Device) error {
	if err := syncFileSystem(dev); err != nil {
		return err
	}
	return dev.Sync()
}
