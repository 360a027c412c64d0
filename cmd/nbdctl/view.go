package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// A view is a device as --json prints it. The keys are documented and stable;
// each is always there, null where the value is not known.
type view struct {
	Name        string     `json:"name"` // "nbd3"
	Index       int        `json:"index"`
	Path        string     `json:"path"`
	State       string     `json:"state"`
	Size        int64      `json:"size"`       // bytes
	BlockSize   *int       `json:"block_size"` // bytes
	Label       *string    `json:"label"`      // connect --name
	Backend     *string    `json:"backend"`
	Mode        *string    `json:"mode"`
	Connections *int       `json:"connections"`
	Serving     *int       `json:"connections_alive"`
	ReadOnly    *bool      `json:"read_only"`
	Features    []string   `json:"features"`     // in force, whatever the server offers
	Timeout     *int64     `json:"timeout"`      // seconds
	DeadTimeout *int64     `json:"dead_timeout"` // seconds
	Identifier  *string    `json:"identifier"`
	Since       *time.Time `json:"since"`
	Owner       ownerView  `json:"owner"`
	Loss        *host.Loss `json:"loss"`
}

type ownerView struct {
	PID  *int `json:"pid"`
	Ours bool `json:"ours"`
}

// A fullView is what status and connect print of one device.
type fullView struct {
	view
	Log       *string       `json:"log"`
	LastError *host.Failure `json:"last_error"`
	// Traffic has the counters of each connection, null when the serving
	// process can't be asked.
	Traffic []host.Traffic `json:"traffic"`
	Holders []string       `json:"holders"`
	// unanswered is why the serving process could not be asked, for people.
	unanswered error
}

// viewOf makes the view of d.
func viewOf(d device) view {
	v := view{
		Name:  fmt.Sprintf("nbd%d", d.Index),
		Index: d.Index,
		Path:  nbdnl.Path(d.Index),
		State: d.state().String(),
		Owner: ownerView{Ours: d.connected() && d.ours()},
	}
	if !d.connected() {
		return v
	}
	v.Size = d.Size
	v.BlockSize = known(d.BlockSize, d.BlockSize != 0)
	v.ReadOnly = &d.ReadOnly
	v.Features = features(d.Flags)
	v.Mode = known(d.Mode.String(), d.Mode != nbdnl.ModeUnknown)
	v.Identifier = known(d.Identifier, d.Identifier != "")
	v.Owner.PID = known(d.pid(), d.pid() != 0)
	if e := d.entry; e != nil {
		v.Mode = known(e.Mode, e.Mode != "")
		v.Label = known(e.Spec.Label, e.Spec.Label != "")
		v.Backend = known(e.Spec.Backend(), true)
		v.Connections = known(e.Spec.Connections, true)
		v.Serving = aliveConnections(e)
		v.Timeout = known(int64(e.Spec.Timeout/time.Second), true)
		v.DeadTimeout = known(int64(e.Spec.DeadTimeout/time.Second), true)
		v.Since = &e.Since
		v.Loss = e.Record.Loss
	}
	return v
}

// shownState is the state for people, who should see a loss without looking for it.
func (v view) shownState() string {
	if v.Loss != nil {
		return v.State + ",loss"
	}
	return v.State
}

// lossNote says what was lost first.
func lossNote(l *host.Loss) string {
	return fmt.Sprintf("%s: %s", l.Time.Local().Format(time.DateTime), l.Error)
}

// features names what the kernel asks of the device's server.
func features(f nbdnl.Flags) []string {
	names := []string{}
	for _, n := range []struct {
		flag nbdnl.Flags
		name string
	}{
		{nbdnl.FlagSendFlush, "flush"}, {nbdnl.FlagSendFUA, "fua"}, {nbdnl.FlagSendTrim, "trim"},
		{nbdnl.FlagSendWriteZeroes, "write-zeroes"}, {nbdnl.FlagRotational, "rotational"},
	} {
		if f&n.flag != 0 {
			names = append(names, n.name)
		}
	}
	return names
}

// aliveConnections is how many connections of the device are alive.
func aliveConnections(e *host.Entry) *int {
	switch {
	case !e.Alive:
		return known(0, true)
	case e.Serving == 0 && e.Phase == host.PhaseLive:
		return nil // The record of a process that does not tell.
	}
	return &e.Serving
}

// known is a pointer to v, or nil.
func known[T any](v T, ok bool) *T {
	if !ok {
		return nil
	}
	return &v
}

// viewDevice makes the full view of the device with that index.
func viewDevice(ctx context.Context, index int) (*fullView, error) {
	store, err := host.OpenStore()
	if err != nil {
		return nil, err
	}
	d, err := lookupIndex(ctx, store, index)
	if err != nil {
		return nil, err
	}
	if !d.connected() { // any more
		return nil, notConnected(d)
	}
	return fullViewOf(ctx, d)
}

// fullViewOf asks everybody who knows something about d.
func fullViewOf(ctx context.Context, d device) (*fullView, error) {
	v := &fullView{view: viewOf(d), Holders: []string{}}
	holders, err := holder.Find(ctx, d.Index)
	if err != nil {
		return nil, err
	}
	for _, h := range holders {
		if d.OwnerPID == 0 && d.keptBy(h) {
			continue // what the kernel does not tell before Linux 6.1
		}
		v.Holders = append(v.Holders, h.String())
	}
	if d.entry == nil {
		return v, nil
	}
	v.Log = &d.entry.Log
	if d.entry.Alive {
		// Only root may ask, and the process may be ending: what it alone
		// knows is then null.
		s, err := d.entry.Status(ctx)
		if err == nil {
			v.Traffic = s.Connections
			v.LastError = s.LastError
		}
		v.unanswered = err
	}
	return v, nil
}

// keptBy tells whether h is the process that keeps our device connected by
// having it open, which is not use.
func (d device) keptBy(h holder.Holder) bool {
	return d.entry != nil && d.entry.Mode == nbdnl.ModeIoctl.String() && h.Kind == holder.Process && h.PID == d.entry.PID
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
