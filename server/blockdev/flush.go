package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Flush writes what the kernel holds back of the device, and returns when the backend has all of it and its Sync has returned: what
// file systems that are mounted on it have not written yet, in whatever mount namespace, and what is cached of the device and its
// partitions.
//
// The error is also of what went wrong before. The kernel acknowledges a write when it is cached; if the backend fails it later, the
// next to sync gets an error, who need not be the one that wrote, and after an unmount nobody does. Here the owner does: the error
// matches a *server.LossError that names the first of the requests that were not executed, or says that there was no connection to
// send them over. Each loss is told once, by the first Flush or Close after it; the device goes on.
//
// The error matches nbdnl.ErrNotConnected if the device has ended. If ctx ends first, Flush returns, and goes on in the background
// until the backend answers or the device ends; Disconnect may find the device in use by it.
func (d *Device) Flush(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(d.flush(ctx), d.TakeLoss())
}

func (d *Device) flush(ctx context.Context) error {
	select {
	case <-d.done:
		return fmt.Errorf("blockdev: %s has ended: %w", d.Path(), nbdnl.ErrNotConnected)
	default:
	}
	result := make(chan error, 1)
	go func() { result <- d.machine.flush(d.index) }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return fmt.Errorf("blockdev: %s: what is cached is not written yet: %w", d.Path(), context.Cause(ctx))
	}
}

// flush writes what the kernel holds back of a device. It takes as long as the kernel does.
func (m machine) flush(index int) error {
	disk := filepath.Base(nbdnl.Path(index))
	partitions, err := filepath.Glob(m.path("sys/block", disk, disk+"p*"))
	if err != nil {
		return err
	}
	// The whole disk last: its sync is the one that makes the backend's Sync cover the others.
	for _, p := range append(partitions, disk) {
		err := m.flushNode(filepath.Join("/dev", filepath.Base(p)))
		if err != nil && !(filepath.Base(p) != disk && errors.Is(err, os.ErrNotExist)) { // A partition that was removed meanwhile.
			return fmt.Errorf("blockdev: what is cached was not written: %w", err)
		}
	}
	return nil
}

func (m machine) flushNode(path string) error {
	// Read-only is enough, and does not make udev look at the device when it is closed, as the end of a write access does.
	dev, err := m.open(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	err = syncFileSystem(dev)
	if err == nil {
		err = dev.Sync()
	}
	return errors.Join(err, dev.Close())
}

// TakeLoss returns what Flush and Close tell of what was lost earlier, and writes nothing. It does not block. Like theirs, its answer
// is given once.
func (d *Device) TakeLoss() error {
	d.mu.Lock()
	lost := d.undelivered
	d.undelivered = nil
	d.mu.Unlock()
	if loss := d.export.TakeLoss(); loss != nil {
		lost = errors.Join(fmt.Errorf("blockdev: %s: %w", d.Path(), loss), lost)
	}
	return lost
}

// misses notes that the kernel may have failed writes that no connection carried to the server. The caller holds mu.
func (d *Device) misses(reason error) {
	if d.undelivered == nil && !d.ReadOnly() && !errors.Is(reason, errKicked) {
		d.undelivered = fmt.Errorf("blockdev: %s: writes may be lost, for there was no connection to send them over: %w", d.Path(), reason)
	}
}
