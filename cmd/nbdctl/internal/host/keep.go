package host

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// keepable reports whether another process can go on with the device when this one has died.
func (h *Host) keepable() bool {
	return h.Spec.Restart > 0 && h.record.Mode == nbdnl.ModeNetlink.String()
}

// keep starts a keeper for the device, and gives it the estate. The keeper that there was before is
// not told.
func (h *Host) keep(device *blockdev.Device) error {
	if !h.keepable() {
		return nil
	}
	c, err := startKeeper()
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	return h.keepBy(c, device)
}

// keepBy gives the estate to the keeper at the other end of c.
func (h *Host) keepBy(c *net.UnixConn, device *blockdev.Device) error {
	k := watchKeeper(c)
	if err := h.entrust(k, device); err != nil {
		c.Close()
		return err
	}
	h.setKeeper(k)
	return nil
}

// entrust gives the keeper the estate as it is now.
func (h *Host) entrust(k *keeping, device *blockdev.Device) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.replaced = device.Outage().Replaced
	e, err := h.estate(device)
	if err == nil {
		err = k.entrust(e)
		e.close()
	}
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	return nil
}

// keeper is the connection to the keeper; nil: there is none.
func (h *Host) keeper() *keeping {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keeping
}

func (h *Host) setKeeper(k *keeping) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keeping = k
}

// estate is what the next process needs to have. The files are copies.
func (h *Host) estate(device *blockdev.Device) (_ *estate, err error) {
	h.mu.Lock()
	e := &estate{Version: estateVersion, UUID: h.record.UUID, Spec: h.record.Spec, Environ: environ()}
	h.mu.Unlock()
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if err := e.addSecrets(h.Spec.Secrets); err != nil {
		return nil, err
	}
	control, err := h.control.file()
	if err != nil {
		return nil, err
	}
	e.add(passControl, control)
	if h.backing.Keep != nil {
		backend, err := h.backing.Keep()
		if err != nil {
			return nil, err
		}
		e.Backend = backend.State
		e.add(passBackend, backend.Files...)
	}
	var files []*os.File
	if e.Device, files, err = device.Keep(); err != nil {
		return nil, err
	}
	e.add(passDevice, files...)
	return e, nil
}

// keepAgain replaces a keeper that has died. A handover is waited for: the next process has a
// keeper of its own, which takes the place of this one.
func (h *Host) keepAgain(ctx context.Context, device *blockdev.Device) {
	changed, err := h.beginChange(ctx)
	if err != nil {
		return
	}
	defer changed()
	if handedOver(device) {
		return
	}
	if !h.keepers.take(h.Spec.Restart, time.Now()) {
		h.log.Error("the keeper has died again, and is not replaced any more", "limit", h.Spec.Restart,
			"within", restartWindow)
		return
	}
	h.log.Warn("the keeper has died, another one takes its place")
	h.unkept(h.keep(device))
}

// keepUp gives the keeper the connections that were replaced since it has the estate. A handover is
// waited for.
func (h *Host) keepUp(ctx context.Context, device *blockdev.Device) {
	changed, err := h.beginChange(ctx)
	if err != nil {
		return
	}
	defer changed()
	k := h.keeper()
	if k == nil || handedOver(device) || k.hasAll(device) {
		return
	}
	if err := h.entrust(k, device); err != nil {
		h.log.Error("the keeper does not have what has changed", "error", err)
	}
}

// unkept tells why there is no keeper.
func (h *Host) unkept(err error) {
	if err != nil {
		h.log.Error("nobody is to serve it when this process dies", "error", err)
	}
}
