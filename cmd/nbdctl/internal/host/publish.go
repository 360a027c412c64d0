package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// publish makes the device known: to lists by the record, to askers by the
// control socket, to whoever waits by Ready.
func (h *Host) publish(ctx context.Context, device *blockdev.Device, backing *Backing) (err error) {
	index := device.Index()
	if err := h.update(func(r *Record) {
		r.Index = &index
		r.Incarnation = nbdnl.IncarnationOf(index)
		r.Mode = device.Mode().String()
		r.Phase = PhaseLive
		r.Serving = device.Alive()
		r.Size = device.Size()
		r.BlockSize = device.BlockSize()
		r.Identity = backing.Identity
		r.Remote = h.remote.state(device)
		r.Spec.Connections = device.Connections() // A server may be good for one alone.
	}); err != nil {
		return err
	}
	if err := h.Store.forgetEnded(index); err != nil {
		h.log.Warn("lists may still show what has ended before", "reason", err)
	}
	listener, err := listenControl(filepath.Join(h.state.path, "ctl"))
	if err != nil {
		return err
	}
	h.answerOn(listener, device)
	defer func() {
		if err != nil {
			err = errors.Join(err, h.keeper().release())
			h.control.close(errEnding)
		}
	}()
	warnings := append(backing.Warnings, h.connectWarnings(device)...)
	if err := h.keep(device); err != nil {
		warnings = append(warnings, fmt.Sprintf("nobody is to serve %s when pid %d dies: %v",
			h.record.Device(), os.Getpid(), err))
	}
	if device.Mode() == nbdnl.ModeIoctl {
		ignoreStops() // which would end the device
	}
	for _, w := range warnings {
		h.log.Warn(w)
	}
	h.log.Info("connected", "device", h.record.Device(), "size", device.Size(), "backend", h.Spec.Backend())
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := h.Ready(ctx, h.status(device).Record, h.redactor.Texts(warnings)); err != nil {
		return fmt.Errorf("nobody waits for the device any more: %w", err)
	}
	return nil
}

// connectWarnings are for the user of a device that is connected in a way that
// may not be what was meant.
func (h *Host) connectWarnings(device *blockdev.Device) []string {
	var warnings []string
	if n := runtime.NumCPU(); h.Spec.Connections > n {
		warnings = append(warnings, fmt.Sprintf(
			"--connections %d: the kernel uses no more than there are processors, which is %d",
			h.Spec.Connections, n))
	}
	if device.Mode() == nbdnl.ModeIoctl && !h.Spec.Ioctl {
		warnings = append(warnings, fmt.Sprintf(
			"%s is connected by ioctls, for netlink is not to be seen in this network namespace: "+
				"no connection can be replaced that dies, and the device ends if its process is stopped; "+
				"nsenter --net=/proc/1/ns/net nbdctl … uses netlink, and --ioctl says that this is meant",
			nbdnl.Path(device.Index())))
	}
	return warnings
}

// decide decides what the spec leaves to the way in which the device is served.
func (h *Host) decide(mode nbdnl.Mode) {
	if mode == nbdnl.ModeIoctl {
		h.Spec.Restart = 0 // The kernel ends it with the process.
	}
	if h.Spec.DeadTimeout < 0 {
		h.Spec.DeadTimeout = 0
		if h.Spec.Restart > 0 {
			h.Spec.DeadTimeout = DefaultDeadTimeout
		}
	}
	h.record.Spec.Restart, h.record.Spec.DeadTimeout = h.Spec.Restart, h.Spec.DeadTimeout
}

// tellMissed has writes that were lost before told, as soon as they are known.
func (h *Host) tellMissed(device *blockdev.Device) {
	if h.backing.Missed == nil {
		return
	}
	go func() {
		err := h.backing.Missed()
		if err == nil {
			return
		}
		h.log.Error("writes were lost before", "device", h.record.Device(), "error", err)
		if err := h.update(func(r *Record) {
			if r.Loss == nil {
				r.Loss = lossOf(err, h.redactor)
			}
		}); err != nil {
			h.log.Warn("lists do not show it", "reason", err)
		}
	}()
}
