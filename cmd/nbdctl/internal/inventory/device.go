package inventory

import (
	"fmt"
	"os"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// A Device is what the kernel and our records together say of one.
type Device struct {
	// Status is what the kernel shows.
	nbdnl.Status
	// Entry is the record of the process that serves it; nil if there is none.
	Entry *host.Entry
	// Incarnation is that of the index when the device was connected, where no identifier tells. 0
	// is unknown.
	Incarnation nbdnl.Incarnation
	// Stopped is whether the process that serves it by ioctls is known to be stopped. The kernel
	// has ended the device then, and every access to it fails.
	Stopped bool
	// Left is whether another program's device is known to have nobody who serves it: its index was
	// leased (claim.Lease), and the process that had it has ended.
	Left bool

	root string // the directory that holds proc
}

// servingName is what a process of ours is called in /proc.
const servingName = "nbdctl"

// Ours tells whether nbdctl connected the device. The mark in the kernel suffices, for the state
// directory may have been lost.
func (d *Device) Ours() bool {
	return d.Entry != nil || strings.HasPrefix(d.Identifier, host.IdentifierPrefix+":")
}

// State completes Status.State, which the kernel shows, by what our processes know.
func (d *Device) State() nbdnl.State {
	switch {
	case d.Left:
		return nbdnl.StateOrphaned
	case !d.Connected() || !d.Ours():
		return d.Status.State
	case d.Entry != nil && d.Entry.GaveUp != nil: // Its keeper ends it, or has.
		return nbdnl.StateOrphaned
	case d.Entry != nil && !d.Entry.Alive && d.Entry.Keeper != nil:
		return nbdnl.StateWaiting // for the next process
	case d.Entry == nil && d.ownerGone(), d.Entry != nil && !d.Entry.Alive:
		return nbdnl.StateOrphaned
	case d.Entry == nil:
		return d.Status.State
	case d.Entry.Phase == host.PhaseConnecting:
		return nbdnl.StateConnecting
	case d.Entry.Phase == host.PhaseDisconnecting:
		return nbdnl.StateDisconnecting
	case d.Stopped:
		return nbdnl.StateOrphaned
	case d.Entry.Phase == host.PhaseDegraded:
		return nbdnl.StateDegraded
	case d.Entry.Phase == host.PhaseWaiting:
		return nbdnl.StateWaiting
	}
	return d.Status.State
}

// Ended tells whether nbdctl has ended the device, since the process that served it died too often.
// Its record is there to say so.
func (d *Device) Ended() bool { return !d.Connected() && d.Entry != nil && d.Entry.GaveUp != nil }

// Unserved tells whether nobody answers the device's requests any more. A server elsewhere does,
// with which the kernel speaks itself, although nobody watches over that.
func (d *Device) Unserved() bool { return d.State() == nbdnl.StateOrphaned && !d.direct() }

// direct tells whether the kernel speaks with a server elsewhere.
func (d *Device) direct() bool {
	return d.Entry != nil && d.Entry.Remote != nil && d.Entry.Remote.Way == host.Direct
}

// ownerGone tells, for a device whose record has been lost, whether the process that connected it
// is known to have ended. In a container it may be out of sight and well.
func (d *Device) ownerGone() bool {
	return d.OwnerGone || d.OwnerPID != 0 && comm(d.root, d.OwnerPID) != servingName
}

// findStopped tells whether the process that serves our device by ioctls is known to be stopped.
// Its thread is in the kernel for as long as the device is connected (NBD_DO_IT). A stop takes the
// thread out of there, and the kernel then shuts down the device's connections
// (nbd_start_device_ioctl). Nothing else shows that: what sysfs has stays while the process keeps
// the device open.
func (d *Device) findStopped() bool {
	e := d.Entry
	if e == nil || !e.Alive || e.Mode != nbdnl.ModeIoctl.String() || e.Phase == host.PhaseConnecting {
		return false
	}
	switch {
	case d.OwnerTID == 0: // before Linux 6.1
		return comm(d.root, e.PID) == servingName && isStopped(d.root, e.PID)
	case d.OwnerPID != e.PID: // in another pid namespace
		return false
	}
	return isStopped(d.root, d.OwnerTID)
}

// PID is the process that serves the device, or did until it was killed; 0 if unknown.
func (d *Device) PID() int {
	switch {
	case d.Entry != nil:
		return d.Entry.PID
	case d.Ours() && d.ownerGone(), d.Left:
		return 0 // The number may be another's by now.
	}
	return d.OwnerPID
}

// Server is the process that serves our device, 0 if it is not ours.
func (d *Device) Server() int {
	if d.Entry == nil {
		return 0
	}
	return d.Entry.PID
}

// Connector names the process that connected the device.
func (d *Device) Connector() string {
	pid := d.PID()
	if d.Left {
		return "a program that has ended"
	}
	if pid == 0 {
		return "another program"
	}
	who := fmt.Sprintf("pid %d (%s)", pid, comm(d.root, pid))
	if d.Entry != nil {
		who += ", which serves " + d.Entry.Spec.Backend()
	}
	return who
}

// keeps tells whether h is the process that keeps our device connected by having it open, which is
// not use.
func (d *Device) keeps(h holder.Holder) bool {
	return d.Entry != nil && d.Entry.Mode == nbdnl.ModeIoctl.String() &&
		h.Kind == holder.Process && h.PID == d.Entry.PID
}

// comm is the name of the process pid, in the machine below root.
func comm(root string, pid int) string {
	b, err := os.ReadFile(procPath(root, pid, "comm"))
	if err != nil {
		return "gone"
	}
	return strings.TrimSpace(string(b))
}

// isStopped tells whether a thread is stopped, by a signal or a debugger (proc_pid_status(5)).
func isStopped(root string, tid int) bool {
	b, err := os.ReadFile(procPath(root, tid, "status"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if state, found := strings.CutPrefix(line, "State:"); found {
			state = strings.TrimSpace(state)
			return strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t")
		}
	}
	return false
}
