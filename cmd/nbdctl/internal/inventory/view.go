package inventory

import (
	"context"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// A View is a device as --json prints it. The keys are documented and stable; each is always there,
// null where the value is not known.
type View struct {
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
	Owner       Owner      `json:"owner"`
	Loss        *host.Loss `json:"loss"`
	// Restart is what becomes of the device when the serving process dies.
	Restart *Restart `json:"restart"`
	// Remote is how the backend is connected if it is another server's export.
	Remote *host.RemoteState `json:"remote"`
	// Stopped is Device.Stopped, for people.
	Stopped bool `json:"-"`
	// Attachable is whether another process can go on with the device, whose own one has died.
	Attachable bool `json:"-"`
}

// A Restart says who has another process serve a device when the serving one dies, and how often.
type Restart struct {
	By       *string `json:"by"`    // "systemd" or "keeper"; null: nobody
	PID      *int    `json:"pid"`   // of the keeper
	Unit     *string `json:"unit"`  // of systemd, that it is in; null: none
	Limit    int     `json:"limit"` // within ten minutes
	Restarts int     `json:"restarts"`
	// Undisturbed is how many of them have gone on with all connections as they were.
	Undisturbed int          `json:"undisturbed"`
	GaveUp      *host.GaveUp `json:"gave_up"`
}

// restartOf is that of a device of ours.
func restartOf(e *host.Entry) *Restart {
	r := &Restart{Limit: e.Spec.Restart, Restarts: e.Restarts, Undisturbed: e.Undisturbed, GaveUp: e.GaveUp}
	if k := e.Keeper; k != nil {
		r.By, r.PID = known("keeper", true), &k.PID
		if k.Unit != "" {
			r.By, r.Unit = known("systemd", true), &k.Unit
		}
	}
	return r
}

// An Owner is who connected a device.
type Owner struct {
	PID  *int `json:"pid"`
	Ours bool `json:"ours"`
}

// A Full view is what status and connect print of one device.
type Full struct {
	View
	Log       *string       `json:"log"`
	LastError *host.Failure `json:"last_error"`
	// Traffic has the counters of each connection, null when the serving process can't be asked.
	Traffic []host.Traffic `json:"traffic"`
	Holders []string       `json:"holders"`
	// Unanswered is why the serving process could not be asked, for people.
	Unanswered error `json:"-"`
}

// StateEnded is the state of a device that has Ended. The kernel shows no device there.
const StateEnded = "ended"

// View makes the view of d.
func (d *Device) View() View {
	v := View{
		Name:  fmt.Sprintf("nbd%d", d.Index),
		Index: d.Index,
		Path:  nbdnl.Path(d.Index),
		State: d.State().String(),
		Owner: Owner{Ours: d.Connected() && d.Ours()},
	}
	if d.Ended() {
		v.State, v.Size, v.Since = StateEnded, d.Entry.Size, &d.Entry.Since
		v.Label = known(d.Entry.Spec.Label, d.Entry.Spec.Label != "")
		v.Backend = known(d.Entry.Spec.Backend(), true)
		v.Restart = restartOf(d.Entry)
	}
	if !d.Connected() {
		return v
	}
	v.Size = d.Size
	v.BlockSize = known(d.BlockSize, d.BlockSize != 0)
	v.ReadOnly = known(d.ReadOnly, true)
	v.Features = features(d.Flags)
	v.Mode = known(d.Mode.String(), d.Mode != nbdnl.ModeUnknown)
	v.Identifier = known(d.Identifier, d.Identifier != "")
	v.Owner.PID = known(d.PID(), d.PID() != 0)
	if e := d.Entry; e != nil {
		v.Mode = known(e.Mode, e.Mode != "")
		v.Label = known(e.Spec.Label, e.Spec.Label != "")
		v.Backend = known(e.Spec.Backend(), true)
		v.Connections = known(e.Spec.Connections, true)
		v.Serving = aliveConnections(e)
		v.Stopped = d.Stopped
		if d.State() == nbdnl.StateOrphaned {
			v.Serving = known(0, !d.direct())
		}
		v.Timeout = known(int64(e.Spec.Timeout/time.Second), true)
		v.DeadTimeout = known(int64(e.Spec.DeadTimeout/time.Second), true)
		v.Since = &e.Since
		v.Loss = e.Record.Loss
		v.Remote = e.Record.Remote
		v.Restart = restartOf(e)
		left := !e.Alive && (e.GaveUp == nil || d.direct())
		v.Attachable = left && e.Mode == nbdnl.ModeNetlink.String() && e.Identity != ""
	}
	return v
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
	if e.Serving == 0 && e.Phase == host.PhaseLive {
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

// Full makes the full view of the device with that index, which must be connected.
func (in *Inventory) Full(ctx context.Context, index int) (*Full, error) {
	d, err := in.LookupIndex(ctx, index)
	if err != nil {
		return nil, err
	}
	if !d.Connected() { // any more
		return nil, d.NotConnected()
	}
	return in.FullOf(ctx, d)
}

// FullOf asks everybody who knows something about d.
func (in *Inventory) FullOf(ctx context.Context, d Device) (*Full, error) {
	v := &Full{View: d.View(), Holders: []string{}}
	holders, err := in.System.Holders().Find(ctx, d.Index)
	if err != nil {
		return nil, err
	}
	for _, h := range holders {
		if d.OwnerPID == 0 && d.keeps(h) {
			continue // what the kernel does not tell before Linux 6.1
		}
		v.Holders = append(v.Holders, h.String())
	}
	if d.Entry == nil {
		return v, nil
	}
	v.Log = &d.Entry.Log
	if d.Entry.Alive && !d.Stopped {
		// Only root may ask, and the process may be ending: what only it
		// knows is then null.
		s, err := d.Entry.Status(ctx)
		if err == nil {
			v.Traffic = s.Connections
			v.LastError = s.LastError
			v.Remote = s.Record.Remote
		}
		v.Unanswered = err
	}
	return v, nil
}
