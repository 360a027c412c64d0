package inventory

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// An Event is a line of watch --json: what happened, and the device as it is then; of one that has
// gone, as it was, but for its state.
type Event struct {
	Time  time.Time `json:"time"`
	Event string    `json:"event"`
	View
}

// EventPresent is the event of devices that were connected before Watch began.
const EventPresent = "present"

// lookPatience bounds a look at one device, should the kernel be stuck.
const lookPatience = time.Second

// Watch tells what happens to devices until ctx ends, which is no error, or tell fails. It begins
// with the devices that are connected already.
func (in *Inventory) Watch(ctx context.Context, tell func(Event) error) error {
	client, err := in.System.NewClient()
	if err != nil {
		return err
	}
	defer client.Close()
	// Before the first look, so that nothing falls between.
	records, err := in.Store.Changes(ctx)
	if err != nil {
		return err
	}
	kernel, err := client.Watch(ctx)
	if err != nil {
		return err
	}
	defer kernel.Close()
	look := func(index int) (nbdnl.Status, error) {
		ctx, cancel := context.WithTimeout(ctx, lookPatience)
		defer cancel()
		return client.Status(ctx, index)
	}
	m := &monitor{in: in, look: look, tell: tell, shown: make(map[int]View), now: make(map[int]nbdnl.Status)}
	return m.run(ctx, kernel, records)
}

// A monitor tells what the kernel and our records together say, as it comes.
type monitor struct {
	in    *Inventory
	look  func(index int) (nbdnl.Status, error)
	tell  func(Event) error
	shown map[int]View         // what was told last, of connected devices
	now   map[int]nbdnl.Status // the same, as the kernel shows it
}

func (m *monitor) run(ctx context.Context, kernel *nbdnl.Watch, records <-chan struct{}) error {
	entries := m.entries()
	for _, st := range kernel.Devices() {
		if err := m.show(time.Now(), EventPresent, st, entries); err != nil {
			return err
		}
	}
	events := make(chan nbdnl.Event)
	ended := make(chan error, 1)
	go func() { ended <- forward(ctx, kernel, events) }()
	for {
		var err error
		select {
		case e := <-events:
			err = m.event(e)
		case <-records:
			err = m.refresh()
		case err := <-ended:
			if ctx.Err() != nil {
				return nil // interrupted, which is how watching ends
			}
			return err
		}
		if err != nil {
			return err
		}
	}
}

// forward passes on the kernel's events.
func forward(ctx context.Context, kernel *nbdnl.Watch, events chan<- nbdnl.Event) error {
	for {
		e, err := kernel.Next()
		if err != nil {
			return err
		}
		select {
		case events <- e:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// event tells an event of the kernel's.
func (m *monitor) event(e nbdnl.Event) error {
	if e.Kind != nbdnl.EventDisconnect {
		return m.show(e.Time, e.Kind.String(), e.Status, m.entries())
	}
	v, ok := m.shown[e.Index]
	if !ok {
		d := Device{Status: e.Previous, root: m.in.System.Root}
		v = d.View()
	}
	delete(m.shown, e.Index)
	delete(m.now, e.Index)
	v.State = e.Status.State.String()
	return m.tell(Event{e.Time, e.Kind.String(), v})
}

// show tells an event of a device that is there.
func (m *monitor) show(at time.Time, event string, st nbdnl.Status, entries []host.Entry) error {
	v := m.view(st, entries)
	if st.Connected() {
		m.shown[st.Index], m.now[st.Index] = v, st
	}
	return m.tell(Event{at, event, v})
}

// view is that of the device which the kernel shows; entries stay as they are.
func (m *monitor) view(st nbdnl.Status, entries []host.Entry) View {
	d, _ := m.in.pair(st, slices.Clone(entries))
	return d.View()
}

// refresh tells what is different now, by what our processes say of themselves.
func (m *monitor) refresh() error {
	entries := m.entries()
	for _, index := range slices.Sorted(maps.Keys(m.now)) {
		st, err := m.look(index)
		if err != nil || !st.Connected() || st.Identifier != m.now[index].Identifier {
			continue // its end is on its way here
		}
		if same(m.view(st, entries), m.shown[index]) {
			continue
		}
		if err := m.show(time.Now(), nbdnl.EventState.String(), st, entries); err != nil {
			return err
		}
	}
	return nil
}

// same tells whether nothing has changed that a record tells and an event of the kernel's does not.
func same(a, b View) bool {
	return a.State == b.State && (a.Loss == nil) == (b.Loss == nil) &&
		equal(a.Connections, b.Connections) && equal(a.alive(), b.alive()) &&
		equal(a.Timeout, b.Timeout) && equal(a.DeadTimeout, b.DeadTimeout)
}

// alive is how many connections are alive; where that is not known, all are taken to be.
func (v *View) alive() *int {
	if v.Serving == nil {
		return v.Connections
	}
	return v.Serving
}

func equal[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// entries are our records. A damaged one hides no other.
func (m *monitor) entries() []host.Entry {
	entries, _ := m.in.Store.Entries()
	return entries
}
