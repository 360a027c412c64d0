package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// seize opens the device exclusively, unless somebody uses it.
func (d *Device) seize(ctx context.Context) (nbdnl.Device, error) {
	holders, err := d.vacant(ctx)
	if err != nil {
		return nil, err
	}
	if len(holders) > 0 {
		return nil, &nbdnl.BusyError{Index: d.index, Holders: holders}
	}
	dev, err := d.openExclusive(ctx)
	if errors.Is(err, syscall.EBUSY) { // by somebody who can't be seen, as from another namespace
		holders = []nbdnl.Holder{{Kind: nbdnl.HolderExclusive, Device: filepath.Base(d.Path())}}
		return nil, &nbdnl.BusyError{Index: d.index, Holders: holders}
	}
	return dev, err
}

// vacant waits a little for those who have the device open for a moment, as udev does, and returns who still has it then.
func (d *Device) vacant(ctx context.Context) ([]nbdnl.Holder, error) {
	ctx, cancel := context.WithTimeout(ctx, vacantPatience)
	defer cancel()
	tick := time.NewTicker(vacantPatience / 20)
	defer tick.Stop()
	for {
		holders, err := d.client.Holders(d.index)
		if err != nil || len(holders) == 0 || stay(holders) {
			return holders, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return holders, nil
		}
	}
}

// vacantPatience is how long processes are waited for that have the device open.
const vacantPatience = time.Second

// stay reports whether there are holders that do not go by themselves.
func stay(holders []nbdnl.Holder) bool {
	for _, h := range holders {
		if h.Kind != nbdnl.HolderProcess || h.PID == os.Getpid() {
			return true
		}
	}
	return false
}

// openExclusive opens the device. That can hang for as long as the backend does, so if ctx ends first the device is closed when it
// is open.
func (d *Device) openExclusive(ctx context.Context) (nbdnl.Device, error) {
	type outcome struct {
		dev nbdnl.Device
		err error
	}
	opened := make(chan outcome, 1)
	go func() {
		dev, err := d.machine.open(d.Path(), os.O_RDONLY|syscall.O_EXCL)
		opened <- outcome{dev, err}
	}()
	select {
	case o := <-opened:
		return o.dev, o.err
	case <-ctx.Done():
		go func() {
			if o := <-opened; o.err == nil {
				_ = o.dev.Close() // Nothing was written.
			}
		}()
		return nil, fmt.Errorf("blockdev: %s does not open: %w", d.Path(), context.Cause(ctx))
	}
}
