package nbdnl

import (
	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// An Incarnation tells the present use of an index from those before and after it, also where the
// kernel keeps no identifiers. It is comparable, can be written down as a number, and means the
// same in another process, until the machine is booted anew. 0 is none.
//
// For an index it is the number of the file `pid` in sysfs, which the driver makes when it connects
// a device and removes at its end (nbd_start_device, nbd_config_put).
type Incarnation = machine.Incarnation

// IncarnationOf returns the incarnation of the device that is connected at an index, or 0 if none
// is, or it can't be seen. It does not block.
func IncarnationOf(index int) Incarnation { return System{}.IncarnationOf(index) }

// IncarnationOf is the function IncarnationOf for the system.
func (s System) IncarnationOf(index int) Incarnation {
	return devices.New(s.root()).Incarnation(index)
}
