package inventory

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// Lookup finds the device that the user means by name: by its number, its path or the name given at
// connect.
func (in *Inventory) Lookup(ctx context.Context, name string) (Device, error) {
	if name == "" { // as from a shell's empty variable
		return Device{}, exit.Usagef(`"": must be a device or the name given at connect`)
	}
	if index, err := nbdnl.ParseIndex(name); err == nil {
		return in.LookupIndex(ctx, index)
	}
	devices, rest, err := in.Connected()
	if err != nil && devices == nil {
		return Device{}, err
	}
	var found *Device
	for _, d := range devices {
		if d.Entry == nil || d.Entry.Spec.Label != name {
			continue
		}
		if d.Entry.Alive {
			return d, nil // An orphan's name is free for others.
		}
		if found == nil {
			found = &d
		}
	}
	if found != nil {
		return *found, nil
	}
	for _, e := range rest {
		if e.Alive && e.Spec.Label == name && e.Phase == host.PhaseConnecting {
			return Device{}, exit.With(exit.Busy, "%s is being connected by pid %d; try again when it is done",
				name, e.PID)
		}
	}
	return Device{}, noDevice(name)
}

// LookupIndex finds the device with that index.
func (in *Inventory) LookupIndex(ctx context.Context, index int) (Device, error) {
	client, err := in.System.NewClient()
	if errors.Is(err, nbdnl.ErrNoDriver) {
		return Device{}, noDevice(fmt.Sprintf("nbd%d", index))
	}
	if err != nil {
		return Device{}, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	st, err := client.Status(ctx, index)
	if errors.Is(err, fs.ErrNotExist) {
		return Device{}, noDevice(fmt.Sprintf("nbd%d", index))
	}
	if err != nil {
		return Device{}, err
	}
	// A damaged record hides no other; this device then shows without one.
	entries, _ := in.Store.Entries()
	d, rest := in.pair(st, entries)
	rest = slices.DeleteFunc(rest, func(e host.Entry) bool { return e.Index == nil || *e.Index != index })
	all, _ := in.addEnded([]Device{d}, rest)
	return all[0], nil
}

func noDevice(name string) error {
	return exit.With(exit.NotFound, "there is no device %s; nbdctl list shows those that are", name)
}

// NotConnected is the error of commands that need a connected device.
func (d *Device) NotConnected() error {
	if d.Ended() {
		return exit.With(exit.NotFound, "nbd%d has ended: %s", d.Index, d.Entry.GaveUp.Reason)
	}
	if d.Status.State == nbdnl.StateHeld {
		return exit.With(exit.NotFound, "nbd%d is not connected, though something has it open", d.Index)
	}
	return exit.With(exit.NotFound, "nbd%d is not connected", d.Index)
}
