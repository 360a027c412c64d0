package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// recordVersion is raised when a reader of the old form would misread the new one.
const recordVersion = 1

// A Phase is how far a serving process is with its device.
type Phase string

// The phases, in order; a device may go back from degraded and waiting.
const (
	PhaseConnecting    Phase = "connecting"
	PhaseLive          Phase = "live"
	PhaseDegraded      Phase = "degraded" // some connections are dead
	PhaseWaiting       Phase = "waiting"  // all are, and requests wait for a new one
	PhaseDisconnecting Phase = "disconnecting"
)

// A Record is what a serving process says of itself in state.json. It holds no
// secrets: everybody may read it.
type Record struct {
	Version    int    `json:"version"`
	UUID       string `json:"uuid"`
	Identifier string `json:"identifier"`
	Phase      Phase  `json:"phase"`
	PID        int    `json:"pid"`
	// Index is nil until the kernel has given the device a number.
	Index *int `json:"index"`
	// Incarnation is that of the index at the connect.
	Incarnation nbdnl.Incarnation `json:"birth,omitempty"`
	// Mode is how the kernel was told: "netlink" or "ioctl".
	Mode  string    `json:"mode,omitempty"`
	Since time.Time `json:"since"`
	// Serving is how many connections are alive.
	Serving int `json:"serving"`
	// Size and BlockSize in bytes; 0 before it is connected.
	Size      int64  `json:"size"`
	BlockSize int    `json:"block_size"`
	Log       string `json:"log"`
	Spec      Spec   `json:"spec"`
	// Loss is nil while nothing is known to be lost.
	Loss *Loss `json:"loss,omitempty"`
	// Remote is nil of a backend on this machine.
	Remote *RemoteState `json:"remote,omitempty"`
	// Identity is that of the Backing.
	Identity string `json:"identity,omitempty"`
	// GaveUp is nil while somebody serves the device, or is to.
	GaveUp *GaveUp `json:"gave_up,omitempty"`
	// Restarts is how many processes have taken the place of one that had died, and Undisturbed how
	// many of those have gone on with all connections as they were.
	Restarts    int `json:"restarts,omitempty"`
	Undisturbed int `json:"undisturbed,omitempty"`
	// Passage is the form in which the process hands its device over; 0: it can't.
	Passage int `json:"passage,omitempty"`
}

// A Loss tells of writes that are not where whoever made them may believe them
// to be. It tells of the first of them.
type Loss struct {
	Time  time.Time `json:"time"`
	Error string    `json:"error"`
}

// write puts the record into dir in one step: a reader sees the old one or the
// new one, whole.
func (r *Record) write(dir string) error {
	publish, err := r.prepare(dir, ".state.json")
	if err != nil {
		return err
	}
	return publish()
}

// prepare puts the record into dir by another name, under which no reader looks. publish does the
// step.
func (r *Record) prepare(dir, name string) (publish func() error, err error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	prepared := filepath.Join(dir, name)
	if err := os.WriteFile(prepared, append(data, '\n'), 0o644); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return func() error {
		if err := os.Rename(prepared, filepath.Join(dir, "state.json")); err != nil {
			return fmt.Errorf("record: %w", err)
		}
		return nil
	}, nil
}

// readRecord reads the record of dir. A record of a newer version is read as
// far as this one understands it, so that an older nbdctl still lists it.
func readRecord(dir string) (*Record, error) {
	data, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return nil, err
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		if version := versionOf(data); version > recordVersion {
			err = fmt.Errorf("is of version %d, of which this nbdctl knows up to %d; "+
				"use the nbdctl that connected the device, or a newer one: %w",
				version, recordVersion, err)
		}
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "state.json"), err)
	}
	if r.UUID != filepath.Base(dir) {
		return nil, fmt.Errorf("%s: is the record of %q", filepath.Join(dir, "state.json"), r.UUID)
	}
	return &r, nil
}

// versionOf is the version that a record, a request or an answer has, whatever else is in it; 0 if
// it has none.
func versionOf(object []byte) int {
	var v struct {
		Version int `json:"version"`
	}
	_ = json.Unmarshal(object, &v) // which leaves 0
	return v.Version
}

// Device names the device for people: by its number as soon as it has one.
func (r *Record) Device() string {
	if r.Index == nil {
		return "a device being connected"
	}
	return fmt.Sprintf("nbd%d", *r.Index)
}
