package holder

import "fmt"

// A Kind is the way in which something uses a device.
type Kind uint8

// The kinds of holders.
const (
	Process   Kind = iota // a process has the device open
	Mount                 // a file system on it is mounted
	Swap                  // it is swap space
	Device                // another block device is made of it: dm, md, loop
	Exclusive             // somebody unknown has it open exclusively
)

var holderNames = [...]string{"process", "mount", "swap", "device", "exclusive"}

// String returns the kind's name: "process", "mount", "swap", "device" or "exclusive".
func (k Kind) String() string {
	if int(k) < len(holderNames) {
		return holderNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// A Holder is one user of a device or of a partition of it.
type Holder struct {
	Kind Kind
	// PID is the process that has it open, or one that sees the mount.
	PID int
	// Comm is that process's name.
	Comm string
	// Path is the mount point, the swap device, the name of the device above, or the path by which
	// the process has it open.
	Path string
	// Device is the name of what is held: "nbd3", or "nbd3p1" for a partition.
	Device string
}

// String describes the holder for people.
func (h Holder) String() string {
	switch h.Kind {
	case Process:
		return fmt.Sprintf("process %d (%s) with %s open", h.PID, h.Comm, h.Device)
	case Mount:
		if h.PID != 0 {
			return fmt.Sprintf("mount of %s at %s (seen by process %d, %s)", h.Device, h.Path, h.PID, h.Comm)
		}
		return fmt.Sprintf("mount of %s at %s", h.Device, h.Path)
	case Swap:
		return fmt.Sprintf("swap on %s", h.Device)
	case Device:
		return fmt.Sprintf("device %s on %s", h.Path, h.Device)
	}
	return "an exclusive user that could not be found (a mount in another namespace, or the kernel itself)"
}
