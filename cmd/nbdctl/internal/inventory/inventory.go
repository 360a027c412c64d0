// Package inventory says what each NBD device of the machine is: it looks at what the kernel shows
// and at the records of the processes that serve, and puts the two together. A device of nbdctl is
// known by the mark that the kernel keeps or, where it keeps none, by its record; of other
// programs' devices there is what the kernel shows. Nothing here prints.
package inventory

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// An Inventory is where to look. The zero System is the running machine.
type Inventory struct {
	// Store has the records.
	Store *host.Store
	// System has the devices.
	System nbdnl.System
	// incarnation takes the place of System.IncarnationOf in tests, unless it is nil.
	incarnation func(index int) nbdnl.Incarnation
}

// Open returns the inventory of the running machine, with the store that the environment names.
func Open() (*Inventory, error) {
	store, err := host.OpenStore()
	if err != nil {
		return nil, err
	}
	return &Inventory{Store: store, System: store.System()}, nil
}

// patience bounds the wait for what sysfs does not tell.
const patience = 3 * time.Second

// Connected lists the connected devices of the machine, ascending, with those that have ended
// (Device.Ended), and the records that have none.
// Where there is no driver there are no devices. Connected never waits for the kernel, where
// another program's command may be stuck. A damaged record is an error beside the devices. They are
// nil if they can't be listed.
func (in *Inventory) Connected() (devices []Device, rest []host.Entry, err error) {
	return in.list((*nbdnl.Client).Connected)
}

// All lists the idle devices, too. If the kernel does not answer, which of them are held is not
// known, and an error beside the devices.
func (in *Inventory) All(ctx context.Context) (devices []Device, rest []host.Entry, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return in.list(func(c *nbdnl.Client) ([]nbdnl.Status, error) { return c.Devices(ctx) })
}

// list pairs the devices that look finds with the records.
func (in *Inventory) list(look func(*nbdnl.Client) ([]nbdnl.Status, error)) (devices []Device, rest []host.Entry,
	err error,
) {
	entries, damaged := in.Store.Entries()
	devices = []Device{} // nil is for when they can't be listed
	client, err := in.System.NewClient()
	if errors.Is(err, nbdnl.ErrNoDriver) {
		return devices, entries, damaged
	}
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	all, err := look(client)
	if all == nil && err != nil {
		return nil, nil, err
	}
	for _, st := range all {
		var d Device
		d, entries = in.pair(st, entries)
		devices = append(devices, d)
	}
	devices, entries = in.addEnded(devices, entries)
	return devices, entries, errors.Join(damaged, err)
}

// addEnded adds the devices that have ended since nobody was to serve them any more, unless their
// index is in use, and returns the records that are left.
func (in *Inventory) addEnded(devices []Device, entries []host.Entry) (all []Device, rest []host.Entry) {
	for _, e := range entries {
		if e.GaveUp == nil || e.Alive || e.Index == nil {
			rest = append(rest, e)
			continue
		}
		i, found := slices.BinarySearchFunc(devices, *e.Index, func(d Device, index int) int { return d.Index - index })
		if !found {
			devices = slices.Insert(devices, i, Device{Status: nbdnl.Status{Index: *e.Index}, root: in.System.Root})
		}
		switch d := &devices[i]; {
		case d.Connected(), d.Entry != nil && d.Entry.GaveUp.Time.After(e.GaveUp.Time):
			rest = append(rest, e)
		case d.Entry != nil:
			rest = append(rest, *d.Entry)
			fallthrough
		default:
			d.Entry = &e
		}
	}
	return devices, rest
}

// Sweep removes what killed processes left behind, if their devices have gone too.
func (in *Inventory) Sweep(ctx context.Context) error {
	if !in.Store.Stale() {
		return nil
	}
	devices, _, err := in.Connected()
	if err != nil && devices == nil {
		return err
	}
	return in.Store.Sweep(ctx, func(e host.Entry) bool {
		return slices.ContainsFunc(devices, func(d Device) bool { return d.Entry != nil && d.Entry.UUID == e.UUID })
	})
}

// pair finds the record of the device that the kernel shows, and returns the other records. It may
// change entries.
func (in *Inventory) pair(st nbdnl.Status, entries []host.Entry) (Device, []host.Entry) {
	d := Device{Status: st, root: in.System.Root}
	if d.Connected() && !d.HasIdentifier {
		d.Incarnation = in.incarnationOf(st.Index)
	}
	i := -1
	for j, e := range entries {
		// Where no identifier tells, the process of a former user of the index may not have ended
		// yet.
		if d.Connected() && in.matches(st, e) && (i < 0 || e.Since.After(entries[i].Since)) {
			i = j
		}
	}
	if i >= 0 {
		e := entries[i]
		d.Entry = &e
		if e.Incarnation != 0 && !d.HasIdentifier {
			d.Incarnation = e.Incarnation
		}
		entries = slices.Delete(entries, i, i+1)
	}
	d.Stopped = d.findStopped()
	if d.Connected() && !d.Ours() && d.Identifier != "" {
		// A device without a lease may well outlive the process that connected it, and nothing
		// is known of it. Without privilege nothing is known of the others either.
		left, err := in.System.Claims().LeftAt(d.Index)
		d.Left = err == nil && left == d.Identifier
	}
	return d, entries
}

// matches tells whether e is the record of the device that the kernel shows.
func (in *Inventory) matches(st nbdnl.Status, e host.Entry) bool {
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
	if e.Incarnation != 0 && e.Incarnation != in.incarnationOf(st.Index) {
		return false // of a former use of the index
	}
	if e.Incarnation != 0 && e.Alive && e.Mode == nbdnl.ModeNetlink.String() {
		return true // Who has connected it may have handed it over, and its number be another's.
	}
	// The process's number is another in a container.
	return st.OwnerPID == 0 || e.Alive && (st.OwnerPID == e.PID || comm(in.System.Root, st.OwnerPID) == servingName)
}

// incarnationOf tells the present use of an index from those before and after it.
func (in *Inventory) incarnationOf(index int) nbdnl.Incarnation {
	if in.incarnation != nil {
		return in.incarnation(index)
	}
	return in.System.IncarnationOf(index)
}

// procPath is a file below root about the process or thread with that number.
func procPath(root string, id int, file string) string {
	return filepath.Join("/", root, "proc", strconv.Itoa(id), file)
}
