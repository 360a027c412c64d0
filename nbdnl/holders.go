package nbdnl

import (
	"context"
	"errors"
	"os"
	"slices"
)

// Holders returns who uses the device or a partition of it: processes that have it open, this one
// included; file systems mounted in any mount namespace that a process is in, swap, and device mapper,
// md and loop devices made of it. Without privilege it finds what the caller may see, and that is no
// error.
//
// The descriptor by which ioctls keep a device connected does not count where the kernel tells whose it
// is, which it does not before Linux 6.1, nor in another pid namespace than the initial one: Client.Holders
// knows its own everywhere.
//
// It does not find a process that has mapped the device and closed the descriptor, nor kernel users
// that leave no trace; most of those show when the device is opened exclusively.
//
// It takes a look at every descriptor of every process, and so as long as there are many. HoldersOf takes that look once
// for many devices.
func Holders(index int) ([]Holder, error) { return System{}.Holders(index) }

// Holders is the function Holders for the system.
func (s System) Holders(index int) ([]Holder, error) {
	holders, err := s.holders(index)
	return holders, newError("holders", index, err)
}

// Holders is the function Holders for the Client's system. It knows also which descriptor keeps a device
// connected that this Client has connected by ioctls, on any kernel and in any namespace. Calls that wait at the same time,
// those of Detach included, share one look at the processes, which begins after each of them.
func (c *Client) Holders(index int) ([]Holder, error) {
	holders, err := c.holders(context.Background(), index, c.keeper(index))
	return holders, newError("holders", index, err)
}

// HoldersOf returns who uses each of the devices, as Holders does of one, and takes hardly longer than that. A device
// that nobody uses is in the map, too, with no holders. One that can't be looked at is not, and the error says why not;
// it matches os.ErrNotExist when there is no such device.
func HoldersOf(indexes ...int) (map[int][]Holder, error) { return System{}.HoldersOf(indexes...) }

// HoldersOf is the function HoldersOf for the system.
func (s System) HoldersOf(indexes ...int) (map[int][]Holder, error) {
	w := s.newWalk()
	w.add(indexes...)
	w.run()
	return holdersOf(w, indexes, func(int) descriptor { return descriptor{} })
}

// HoldersOf is the function HoldersOf for the Client's system, with what Client.Holders knows besides.
func (c *Client) HoldersOf(indexes ...int) (map[int][]Holder, error) {
	w, err := c.walks.join(context.Background(), indexes...)
	if err != nil {
		return nil, newError("holders", anyIndex, err)
	}
	return holdersOf(w, indexes, c.keeper)
}

// holdersOf returns what the walk has found, but for the descriptors that keeper knows.
func holdersOf(w *walk, indexes []int, keeper func(index int) descriptor) (map[int][]Holder, error) {
	all := make(map[int][]Holder, len(indexes))
	var errs []error
	for _, index := range indexes {
		holders, err := w.holders(index, keeper(index))
		if err != nil {
			errs = append(errs, newError("holders", index, err))
			continue
		}
		all[index] = holders
	}
	return all, errors.Join(errs...)
}

// holders looks for all holders in a walk of its own, but for descriptors that the caller knows of, and for the one
// without which a device that was connected by ioctls would not be.
func (s *System) holders(index int, except ...descriptor) ([]Holder, error) {
	w := s.newWalk()
	w.add(index)
	w.run()
	return w.holders(index, except...)
}

// holders is that of System, in a walk that begins after the call and may be shared with others. It ends with ctx.
func (c *Client) holders(ctx context.Context, index int, except ...descriptor) ([]Holder, error) {
	w, err := c.walks.join(ctx, index)
	if err != nil {
		return nil, err
	}
	return w.holders(index, except...)
}

// keeper returns the descriptor through which this Client keeps the device connected, if it does.
func (c *Client) keeper(index int) descriptor {
	if !c.driver.serves(index) {
		return descriptor{}
	}
	return descriptor{os.Getpid(), someFD}
}

// A descriptor is one of some process, or with someFD any one, but one only.
type descriptor struct{ pid, fd int }

const someFD = -1

// holders returns the holders that the walk has found of a device, but for descriptors that do not count.
func (w *walk) holders(index int, except ...descriptor) ([]Holder, error) {
	d := w.disks[index]
	if d.err != nil {
		return nil, d.err
	}
	ignored := make(map[descriptor]bool)
	for _, e := range append(except, d.keeper) {
		ignored[e] = true
	}
	var holders []Holder
	for _, t := range d.traces {
		some := descriptor{t.holder.PID, someFD}
		switch {
		case t.holder.Kind != HolderProcess:
		case ignored[descriptor{t.holder.PID, t.fd}]:
			continue
		case ignored[some] && t.holder.Device == name(index):
			delete(ignored, some) // one is enough
			continue
		}
		if !slices.Contains(holders, t.holder) {
			holders = append(holders, t.holder)
		}
	}
	return holders, nil
}
