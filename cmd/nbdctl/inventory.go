package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// A device is what the kernel and our records together say of one.
type device struct {
	nbdnl.Status
	// entry is the record of the process that serves it; nil if there is none.
	entry *host.Entry
	// incarnation is the incarnation of the use of the index that this is about, where no
	// identifier tells; 0 is unknown.
	incarnation nbdnl.Incarnation
	// left is whether another program's device is known to have nobody who serves
	// it: its index was leased (claim.Lease), and the process that had it has ended.
	left bool
}

// ours tells whether nbdctl connected the device. The mark in the kernel
// suffices, for the state directory may have been lost.
func (d device) ours() bool {
	return d.entry != nil || strings.HasPrefix(d.Identifier, host.IdentifierPrefix+":")
}

// connected tells whether the kernel has a configuration for the device.
func (d device) connected() bool {
	return d.State != nbdnl.StateIdle && d.State != nbdnl.StateHeld
}

// state completes what the kernel shows by what our processes know.
func (d device) state() nbdnl.State {
	switch {
	case d.left:
		return nbdnl.StateOrphaned
	case !d.connected() || !d.ours():
		return d.State
	case d.entry == nil && d.ownerGone(), d.entry != nil && !d.entry.Alive:
		return nbdnl.StateOrphaned
	case d.entry == nil:
		return d.State
	case d.entry.Phase == host.PhaseConnecting:
		return nbdnl.StateConnecting
	case d.entry.Phase == host.PhaseDisconnecting:
		return nbdnl.StateDisconnecting
	case d.entry.Phase == host.PhaseDegraded:
		return nbdnl.StateDegraded
	case d.entry.Phase == host.PhaseWaiting:
		return nbdnl.StateWaiting
	}
	return d.State
}

// ownerGone tells, for a device whose record has been lost, whether the
// process that connected it is known to have ended. In a container it may be
// out of sight and well.
func (d device) ownerGone() bool {
	return d.OwnerGone || d.OwnerPID != 0 && comm(d.OwnerPID) != "nbdctl"
}

// pid is the process that serves the device, or did until it was killed; 0 if
// unknown.
func (d device) pid() int {
	switch {
	case d.entry != nil:
		return d.entry.PID
	case d.ours() && d.ownerGone(), d.left:
		return 0 // The number may be another's by now.
	}
	return d.OwnerPID
}

// server is the process that serves our device, 0 if it is not ours.
func (d device) server() int {
	if d.entry == nil {
		return 0
	}
	return d.entry.PID
}

// connector names the process that connected the device.
func (d device) connector() string {
	pid := d.pid()
	if d.left {
		return "a program that has ended"
	}
	if pid == 0 {
		return "another program"
	}
	who := fmt.Sprintf("pid %d (%s)", pid, comm(pid))
	if d.entry != nil {
		who += ", which serves " + d.entry.Spec.Backend()
	}
	return who
}

// comm is the name of the process pid.
func comm(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "gone"
	}
	return strings.TrimSpace(string(b))
}

// matches tells whether e is the record of the device that the kernel shows.
func matches(st nbdnl.Status, e host.Entry) bool {
	if e.Index == nil || *e.Index != st.Index {
		// While it connects, a record has no number yet but the kernel
		// already shows its identifier.
		return e.Index == nil && st.HasIdentifier && st.Identifier == e.Identifier
	}
	if st.HasIdentifier {
		return st.Identifier == e.Identifier
	}
	// Without one the record decides, unless the kernel shows otherwise.
	if st.Mode != nbdnl.ModeUnknown && e.Mode != "" && e.Mode != st.Mode.String() {
		return false
	}
	if e.Incarnation != 0 && e.Incarnation != nbdnl.IncarnationOf(st.Index) {
		return false // of a former use of the index
	}
	// The process's number is another in a container.
	return st.OwnerPID == 0 || e.Alive && (st.OwnerPID == e.PID || comm(st.OwnerPID) == "nbdctl")
}

// inventory lists the connected devices of the machine, ascending, and the
// records that have none. Where there is no driver there are no devices. It
// never waits for the kernel, where another program's command may be stuck.
func inventory(store *host.Store) (devices []device, rest []host.Entry, err error) {
	return inventoryOf(store, (*nbdnl.Client).Connected)
}

// inventoryAll lists the idle devices, too. If the kernel does not answer, which
// of them are held is not known, and an error beside the devices.
func inventoryAll(ctx context.Context, store *host.Store) (devices []device, rest []host.Entry, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	return inventoryOf(store, func(c *nbdnl.Client) ([]nbdnl.Status, error) { return c.Devices(ctx) })
}

// lookPatience bounds the wait for what sysfs does not tell.
const lookPatience = 3 * time.Second

func inventoryOf(store *host.Store, list func(*nbdnl.Client) ([]nbdnl.Status, error)) (devices []device, rest []host.Entry, err error) {
	entries, damaged := store.Entries()
	devices = []device{} // nil is for when they can't be listed
	client, err := nbdnl.New()
	if errors.Is(err, nbdnl.ErrNoDriver) {
		return devices, entries, damaged
	}
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	all, err := list(client)
	if all == nil && err != nil {
		return nil, nil, err
	}
	for _, st := range all {
		var d device
		d, entries = pair(st, entries, store.System().Claims())
		devices = append(devices, d)
	}
	return devices, entries, errors.Join(damaged, err)
}

// pair finds the record of the device that the kernel shows, and returns the
// other records.
func pair(st nbdnl.Status, entries []host.Entry, claims claim.Dir) (device, []host.Entry) {
	d := device{Status: st}
	if d.connected() && !d.HasIdentifier {
		d.incarnation = nbdnl.IncarnationOf(st.Index)
	}
	i := -1
	for j, e := range entries {
		// Where no identifier tells, the process of a former user of the index may not have ended yet.
		if d.connected() && matches(st, e) && (i < 0 || e.Since.After(entries[i].Since)) {
			i = j
		}
	}
	if i >= 0 {
		e := entries[i]
		d.entry = &e
		if e.Incarnation != 0 && !d.HasIdentifier {
			d.incarnation = e.Incarnation
		}
		entries = slices.Delete(entries, i, i+1)
	}
	if d.connected() && !d.ours() && d.Identifier != "" {
		// Of devices without a lease nothing can be known, for they may well outlive the
		// process that connected them; nor, without privilege, of the others.
		left, err := claims.LeftAt(d.Index)
		d.left = err == nil && left == d.Identifier
	}
	return d, entries
}

// sweep removes what killed processes left behind, if their devices have gone too.
func sweep(ctx context.Context, store *host.Store) error {
	if !store.Stale() {
		return nil
	}
	devices, _, err := inventory(store)
	if err != nil && devices == nil {
		return err
	}
	return store.Sweep(ctx, func(e host.Entry) bool {
		return slices.ContainsFunc(devices, func(d device) bool { return d.entry != nil && d.entry.UUID == e.UUID })
	})
}

// lookup finds the device that the user means by name: by its number, its
// path or the name given at connect.
func lookup(ctx context.Context, store *host.Store, name string) (device, error) {
	if name == "" { // as from a shell's empty variable
		return device{}, exit.Usagef(`"": must be a device or the name given at connect`)
	}
	if index, err := nbdnl.ParseIndex(name); err == nil {
		return lookupIndex(ctx, store, index)
	}
	devices, rest, err := inventory(store)
	if err != nil && devices == nil {
		return device{}, err
	}
	var found *device
	for _, d := range devices {
		if d.entry == nil || d.entry.Spec.Label != name {
			continue
		}
		if d.entry.Alive {
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
			return device{}, exit.With(exit.Busy, "%s is being connected by pid %d; try again when it is done", name, e.PID)
		}
	}
	return device{}, noDevice(name)
}

// lookupIndex finds the device with that index.
func lookupIndex(ctx context.Context, store *host.Store, index int) (device, error) {
	client, err := nbdnl.New()
	if errors.Is(err, nbdnl.ErrNoDriver) {
		return device{}, noDevice(fmt.Sprintf("nbd%d", index))
	}
	if err != nil {
		return device{}, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	st, err := client.Status(ctx, index)
	if errors.Is(err, fs.ErrNotExist) {
		return device{}, noDevice(fmt.Sprintf("nbd%d", index))
	}
	if err != nil {
		return device{}, err
	}
	// A damaged record hides no other; this device then shows without one.
	entries, _ := store.Entries()
	d, _ := pair(st, entries, store.System().Claims())
	return d, nil
}

func noDevice(name string) error {
	return exit.With(exit.NotFound, "there is no device %s; nbdctl list shows those that are", name)
}
