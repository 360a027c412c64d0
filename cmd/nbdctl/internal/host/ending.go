package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// gone is what follows when the device ended by somebody else's doing.
func (h *Host) gone(device *blockdev.Device) error {
	err := device.Err()
	if errors.Is(err, blockdev.ErrHandedOver) {
		return err
	}
	if err == nil {
		h.log.Info("disconnected", "device", h.record.Device())
		return nil
	}
	return h.lost(device, err)
}

// errDead is why a device is lost before its connections have said why.
var errDead = errors.New("all connections are dead, and the kernel waits for no new one")

// isDone tells whether nothing is served any more.
func isDone(device *blockdev.Device) bool {
	select {
	case <-device.Done():
		return true
	default:
		return false
	}
}

// lost takes down a device whose connections are dead. The kernel keeps it, and
// every request to it fails; there is no coming back.
func (h *Host) lost(device *blockdev.Device, err error) error {
	h.log.Error("connections lost", "device", h.record.Device(), "error", err)
	return errors.Join(fmt.Errorf("%s: %w", h.record.Device(), err), device.Close())
}

// waitFree stays, with the record, until the kernel has let go of the device.
// The kernel keeps one that was disconnected while held until its last holder
// closes it, and a list should name its owner for so long.
func (h *Host) waitFree(ctx context.Context, client *nbdnl.Client, device *blockdev.Device) error {
	st, err := client.Status(ctx, device.Index())
	if err != nil || !st.Connected() {
		return nil // free
	}
	ours := st.Identifier == h.record.Identifier
	if !st.HasIdentifier {
		ours = nbdnl.IncarnationOf(device.Index()) == h.record.Incarnation
	}
	if !ours {
		return nil // somebody else's already
	}
	if err := h.update(func(r *Record) { r.Phase = PhaseDisconnecting }); err != nil {
		h.log.Warn("its phase could not be noted", "reason", err)
	}
	ctx, stop := withSignals(ctx, h.Signals)
	defer stop()
	if err := client.WaitFree(ctx, device.Index()); err != nil {
		h.log.Warn("gone although the device is still held", "reason", err)
	}
	return nil
}
