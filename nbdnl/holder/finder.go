// Package holder finds out who uses nbd devices: processes that have one open, file systems mounted
// in any mount namespace that a process is in, swap, and device mapper, md and loop devices made of
// one.
//
// Without privilege it finds what the caller may see, and that is no error. It finds neither a
// process that has mapped a device and closed the descriptor, nor kernel users that leave no trace;
// most of those show when the device is opened exclusively.
//
// To find them takes a look at every descriptor of every process, and so as long as there are many.
// That look is taken once for many devices, and calls of one [Finder] that wait at the same time
// share it.
package holder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A Finder finds holders. The zero value looks at the running machine. It may be used by many
// goroutines at a time; its fields must not change while it is.
type Finder struct {
	// Root is the directory that holds the machine's sys, proc and dev.
	Root machine.Root
	// DeviceNumber returns the number ("43:96") of the block device that a path leads to, and false
	// for anything else; nil asks the file system.
	DeviceNumber func(path string) (string, bool)
	// Keeps, unless it is nil, reports whether this process keeps the device connected by ioctls,
	// through a descriptor that does not count as a use.
	Keeps func(index int) bool

	walks walks
}

// A Descriptor is one that a process has open.
type Descriptor struct {
	PID int
	// FD is its number, or AnyFD.
	FD int
}

// AnyFD stands for any descriptor of a process, but one only.
const AnyFD = -1

// Find returns who uses the device or a partition of it, this process included. It looks at the
// running machine. The error matches os.ErrNotExist when there is no such device.
//
// The descriptor by which ioctls keep a device connected does not count where the kernel tells
// whose it is, which it does not before Linux 6.1, nor in another pid namespace than the initial
// one. nbdnl.Client.Holders knows those of the Client everywhere.
func Find(ctx context.Context, index int) ([]Holder, error) { return new(Finder).Find(ctx, index) }

// FindAll returns who uses each of the devices, as Find does of one, and takes hardly longer than
// that. A device that nobody uses is in the map, too, with no holders. One that can't be looked at
// is not, and the error says why not.
func FindAll(ctx context.Context, indexes ...int) (map[int][]Holder, error) {
	return new(Finder).FindAll(ctx, indexes...)
}

// Find is the function Find for the machine, but for descriptors that the caller knows of. The look
// at the processes begins after the call, and may be shared with others. When ctx ends first, the
// error matches that of ctx.
func (f *Finder) Find(ctx context.Context, index int, except ...Descriptor) ([]Holder, error) {
	w, err := f.join(ctx, index)
	if err == nil {
		var holders []Holder
		if holders, err = f.found(w, index, except...); err == nil {
			return holders, nil
		}
	}
	return nil, fmt.Errorf("holders of %s: %w", names.Device(index), err)
}

// FindAll is the function FindAll for the machine.
func (f *Finder) FindAll(ctx context.Context, indexes ...int) (map[int][]Holder, error) {
	w, err := f.join(ctx, indexes...)
	if err != nil {
		return nil, fmt.Errorf("holders: %w", err)
	}
	all := make(map[int][]Holder, len(indexes))
	var errs []error
	for _, index := range indexes {
		holders, err := f.found(w, index)
		if err != nil {
			errs = append(errs, fmt.Errorf("holders of %s: %w", names.Device(index), err))
			continue
		}
		all[index] = holders
	}
	return all, errors.Join(errs...)
}

// found returns the holders that the walk has found of a device, but for descriptors that do not
// count.
func (f *Finder) found(w *walk, index int, except ...Descriptor) ([]Holder, error) {
	d := w.disks[index]
	if d.err != nil {
		return nil, d.err
	}
	ignored := map[Descriptor]bool{d.keeper: true}
	if f.Keeps != nil && f.Keeps(index) {
		ignored[Descriptor{os.Getpid(), AnyFD}] = true
	}
	for _, e := range except {
		ignored[e] = true
	}
	var holders []Holder
	for _, t := range d.traces {
		some := Descriptor{t.holder.PID, AnyFD}
		switch {
		case t.holder.Kind != Process:
		case ignored[Descriptor{t.holder.PID, t.fd}]:
			continue
		case ignored[some] && t.holder.Device == names.Device(index):
			delete(ignored, some) // one is enough
			continue
		}
		if !slices.Contains(holders, t.holder) {
			holders = append(holders, t.holder)
		}
	}
	return holders, nil
}

// deviceNumber returns the number of the block device that a path leads to.
func (f *Finder) deviceNumber(path string) (string, bool) {
	if f.DeviceNumber != nil {
		return f.DeviceNumber(path)
	}
	return machine.DeviceNumber(path)
}

// deviceNumberIn is deviceNumber for a name in an open directory, which is quicker.
func (f *Finder) deviceNumberIn(dir *os.File, name string) (string, bool) {
	if f.DeviceNumber != nil {
		return f.DeviceNumber(dir.Name() + "/" + name)
	}
	return machine.DeviceNumberIn(dir, name)
}
