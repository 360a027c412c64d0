package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/nbdnl"
)

func watchCommand() *cli.Command {
	return &cli.Command{
		Name:  "watch",
		Usage: "print what happens to devices, also those of other programs, until interrupted",
		Description: "First comes a line for each device that is connected already (present), then one for each event: connect,\n" +
			"disconnect, link-dead (a connection of the device has died), resize, and state, which is any other change.\n" +
			"What happens after the first lines is not missed, but for what is undone within milliseconds. Other network namespaces than the first see no link-dead.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object a line"},
		},
		OnUsageError: onUsageError,
		Action:       watch,
	}
}

// An eventView is a line of watch --json: what happened, and the device as it
// is then; of one that has gone, as it was, but for its state.
type eventView struct {
	Time  time.Time `json:"time"`
	Event string    `json:"event"`
	view
}

// eventPresent is the event of devices that were connected before watch began.
const eventPresent = "present"

func watch(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	ctx, stop := interruptible(c)
	defer stop()
	store, err := host.OpenStore()
	if err != nil {
		return err
	}
	client, err := nbdnl.New()
	if err != nil {
		return err
	}
	defer client.Close()
	// Before the first look, so that nothing falls between.
	records, err := store.Changes(ctx)
	if err != nil {
		return err
	}
	kernel, err := client.Watch(ctx)
	if err != nil {
		return err
	}
	defer kernel.Close()
	look := func(index int) (nbdnl.Status, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Second) // should the kernel be stuck
		defer cancel()
		return client.Status(ctx, index)
	}
	m := &monitor{store: store, look: look, print: printEvent(c.App.Writer, c.Bool("json")), shown: make(map[int]view)}
	return m.run(ctx, kernel, records)
}

// A monitor prints what the kernel and our records together say, as it comes.
type monitor struct {
	store *host.Store
	look  func(index int) (nbdnl.Status, error)
	print func(eventView) error
	shown map[int]view         // what was printed last, of connected devices
	now   map[int]nbdnl.Status // the same, as the kernel shows it
}

func (m *monitor) run(ctx context.Context, kernel *nbdnl.Watch, records <-chan struct{}) error {
	m.now = make(map[int]nbdnl.Status)
	entries := m.entries()
	for _, st := range kernel.Devices() {
		if err := m.show(time.Now(), eventPresent, st, entries); err != nil {
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
				return nil // interrupted, which is how watch ends
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

// event prints an event of the kernel's.
func (m *monitor) event(e nbdnl.Event) error {
	if e.Kind != nbdnl.EventDisconnect {
		return m.show(e.Time, e.Kind.String(), e.Status, m.entries())
	}
	v, ok := m.shown[e.Index]
	if !ok {
		v = viewOf(device{Status: e.Previous})
	}
	delete(m.shown, e.Index)
	delete(m.now, e.Index)
	v.State = e.Status.State.String()
	return m.print(eventView{e.Time, e.Kind.String(), v})
}

// show prints an event of a device that is there.
func (m *monitor) show(at time.Time, event string, st nbdnl.Status, entries []host.Entry) error {
	d, _ := pair(st, slices.Clone(entries), m.store.System().Claims())
	v := viewOf(d)
	if st.Connected() {
		m.shown[st.Index], m.now[st.Index] = v, st
	}
	return m.print(eventView{at, event, v})
}

// refresh prints what is different now, by what our processes say of
// themselves.
func (m *monitor) refresh() error {
	entries := m.entries()
	for _, index := range slices.Sorted(maps.Keys(m.now)) {
		st, err := m.look(index)
		if err != nil || !st.Connected() || st.Identifier != m.now[index].Identifier {
			continue // its end is on its way here
		}
		if d, _ := pair(st, slices.Clone(entries), m.store.System().Claims()); same(viewOf(d), m.shown[index]) {
			continue
		}
		if err := m.show(time.Now(), nbdnl.EventState.String(), st, entries); err != nil {
			return err
		}
	}
	return nil
}

// same tells whether nothing has changed that a record tells and an event of
// the kernel's does not.
func same(a, b view) bool {
	return a.shownState() == b.shownState() && connections(a) == connections(b) && timeouts(a) == timeouts(b)
}

// entries are our records. A damaged one hides no other.
func (m *monitor) entries() []host.Entry {
	entries, _ := m.store.Entries()
	return entries
}

// printEvent returns what prints a line for each event.
func printEvent(w io.Writer, asJSON bool) func(eventView) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		return func(v eventView) error { return e.Encode(v) }
	}
	return func(v eventView) error {
		_, err := fmt.Fprintf(w, "%s  %-10s  %-6s  %-13s  %s  %s\n", v.Time.Local().Format("15:04:05.000"), v.Event, v.Name, v.shownState(),
			quantity.FormatSize(v.Size), printable(v.Backend))
		return err
	}
}
