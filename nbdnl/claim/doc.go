// Package claim lets the programs of a machine agree on who may change which nbd device. The kernel
// knows nothing of it.
//
// A [Claim] is for the moment of a change: whoever connects an index of his choice, or disconnects
// a device, claims the index meanwhile. nbdnl.Client.Detach does so by itself. A [Lease] is for as
// long as its holder likes: before a device is connected, while it lives, and between devices. A
// claim is taken under a lease, too.
//
// Both are locks on files in a directory ([Dir]), by which alone programs meet, and end with the
// process, however it ends.
package claim

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// Default is the directory of state that programs share, nbdctl among them, unless they are told of
// another one.
const Default = "/run/nbdctl"

// A Dir is the directory of state in which programs meet. Empty is Default. It is made when
// something is claimed or leased.
type Dir string

// ErrBusy means that somebody else has the claim or the lease. It is nbdnl.ErrBusy, too.
var ErrBusy = errors.New("device is busy")

// file returns the file of an index for claims or leases.
func (d Dir) file(kind string, index int) string {
	return filepath.Join(d.dir(kind), names.Device(index))
}

// dir returns the directory of claims or leases.
func (d Dir) dir(kind string) string {
	if d == "" {
		d = Default
	}
	return filepath.Join(string(d), kind)
}

// wrap adds to err, if there is one, the operation and the device.
func wrap(op string, index int, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", op, names.Device(index), err)
}
