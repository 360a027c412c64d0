package nbdnl

import (
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// An Event is something that has happened to a device, whoever did it.
type Event struct {
	// Time is when it was noticed.
	Time  time.Time
	Kind  EventKind
	Index int
	// Status is the device's after the event, and Previous the one before it. They come from sysfs
	// only: a device that is held but not connected is idle here. Of a device that was not there,
	// only the Index is set.
	Status, Previous Status
}

// An EventKind is what has happened.
type EventKind uint8

// The kinds of events.
const (
	EventConnect    EventKind = iota // the device was connected
	EventDisconnect                  // its index is free again, or was connected anew
	EventLinkDead                    // one or more of its connections died
	EventResize                      // its size changed
	EventState                       // something else of its status changed, such as State, ReadOnly or BlockSize
	EventAdd                         // the driver has made the device
	EventRemove                      // the driver has removed it
)

var eventNames = [...]string{"connect", "disconnect", "link-dead", "resize", "state", "add", "remove"}

// String returns the kind's name: "connect", "disconnect", "link-dead", "resize", "state", "add" or
// "remove".
func (k EventKind) String() string {
	if int(k) < len(eventNames) {
		return eventNames[k]
	}
	return fmt.Sprintf("EventKind(%d)", uint8(k))
}

// MarshalText returns the kind's name.
func (k EventKind) MarshalText() ([]byte, error) {
	if int(k) >= len(eventNames) {
		return nil, fmt.Errorf("nbdnl: event kind %d has no name", uint8(k))
	}
	return []byte(k.String()), nil
}

// A sight is what one look at an index has shown.
type sight struct {
	exists bool
	use    devices.Use
	status Status
}

// none is the sight of an index without a device, idle that of a device without a connection.
func none(index int) sight { return sight{status: Status{Index: index}} }
func idle(index int) sight { return sight{exists: true, status: Status{Index: index}} }

// changes returns what has happened between two sights of an index, in an order in which it can
// have. dead is whether connections of the device have died since the first one.
func changes(before, after sight, dead bool) []Event {
	var events []Event
	now := before
	step := func(k EventKind, next sight) {
		events = append(events, Event{Kind: k, Index: after.status.Index, Status: next.status, Previous: now.status})
		now = next
	}
	index := after.status.Index
	same := before.use == after.use
	if !before.exists && after.exists {
		step(EventAdd, idle(index))
	}
	if dead && before.use.Connected {
		step(EventLinkDead, now)
	}
	switch {
	case before.use.Connected && after.use.Connected && !same:
		step(EventDisconnect, idle(index))
	case before.use.Connected && !after.use.Connected && after.exists:
		step(EventDisconnect, after)
	case before.use.Connected && !after.exists:
		step(EventDisconnect, idle(index))
	}
	if after.use.Connected && !same {
		step(EventConnect, after)
		if dead && !before.use.Connected {
			step(EventLinkDead, after)
		}
	}
	if after.use.Connected && same {
		if before.status.Size != after.status.Size && before.status.State == after.status.State {
			step(EventResize, after)
		}
		if differs(before.status, after.status) {
			step(EventState, after)
		}
	}
	if before.exists && !after.exists {
		step(EventRemove, after)
	}
	return events
}

// differs reports whether two statuses of a connected device differ in more than size and owner.
func differs(a, b Status) bool {
	return a.State != b.State || a.ReadOnly != b.ReadOnly || a.BlockSize != b.BlockSize || a.Flags != b.Flags
}
