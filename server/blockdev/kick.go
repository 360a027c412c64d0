package blockdev

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// kickPatience bounds Kick.
const kickPatience = 10 * time.Second

// errKicked is what Err says after Kick.
var errKicked = errors.New("blockdev: the device was kicked out, with all requests in flight")

// Kick takes the device from the kernel at once, whatever state it is in: every request in flight
// fails with EIO, and so does everything that is asked of the device from then on. Nothing is
// written before, so what is cached is lost. It is for I/O that is stuck, on a backend that does
// not come back or on connections that nobody replaces.
//
// Kick waits neither for the backend nor for those who hold the device; it returns within ctx, and
// after 10 seconds at the latest. It may be called while Disconnect or Close is at work, which then
// come to an end. Done is closed when the backend has let go of the last request, and Close is
// still due. A device that was handed over is another process's, and the error is ErrHandedOver.
func (d *Device) Kick(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, kickPatience)
	defer cancel()
	if d.conns.handedOver() {
		return ErrHandedOver
	}
	d.losses.excuse()
	d.conns.blame(errKicked)
	// First the connections, all of them: the kernel announces the end of the device on each, and
	// that would wait for room on one that the server does not read any more (nbd.c,
	// send_disconnects). On a dead one it fails.
	d.conns.cut()
	err := d.client.Drop(ctx, d.index, d.Identifier())
	if errors.Is(err, errors.ErrUnsupported) && d.machine.same(d.index, d.incarnation) {
		err = d.client.DropAny(ctx, d.index) // This kernel keeps no identifiers.
	}
	// Where the kernel keeps no identifiers, another's device is known by its incarnation.
	if missing(err) || errors.Is(err, errors.ErrUnsupported) && d.gone(ctx) {
		return nil
	}
	return err
}

// missing reports whether err says that there is no such device, or that it is another's.
func missing(err error) bool {
	return errors.Is(err, nbdnl.ErrNotConnected) || errors.Is(err, nbdnl.ErrNotOwner) || errors.Is(err, os.ErrNotExist)
}
