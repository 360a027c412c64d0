package host

import (
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// Command is the hidden command that the serving process runs as.
const Command = "__serve"

// A Spec says what to serve and how. It is what the command line becomes, what
// the serving process is started with and what its record repeats.
type Spec struct {
	// Label is the name that the user gave, "" for none.
	Label string `json:"label,omitempty"`
	// Index is the device asked for; nil lets the kernel choose.
	Index *int `json:"index,omitempty"`
	// Kind names the backend ("memory"), Arg is its argument ("disk.img").
	Kind string `json:"kind"`
	Arg  string `json:"arg,omitempty"`
	// Options are the backend's own, key=value. The value of one that is secret is a reference.
	Options []string `json:"options,omitempty"`
	// Secrets are the values of those, by key. No file and no argument has them: the serving
	// process gets them through a pipe of their own.
	Secrets secret.Set `json:"-"`
	// Size in bytes; 0: the backend's own.
	Size int64 `json:"size,omitempty"`
	// Create allows the backing object to be made.
	Create   bool `json:"create,omitempty"`
	ReadOnly bool `json:"read_only,omitempty"`
	// BlockSize in bytes; 0: the backend's own, else 512.
	BlockSize int `json:"block_size,omitempty"`
	// Ioctl asks for ioctls, where netlink would do.
	Ioctl       bool          `json:"ioctl,omitempty"`
	Connections int           `json:"connections"`
	Timeout     time.Duration `json:"timeout"`
	// DeadTimeout is negative where the way in which the device is served decides.
	DeadTimeout time.Duration `json:"dead_timeout"`
	// Restart is how often within restartWindow another process takes the place of one that has
	// died; 0: none does.
	Restart int `json:"restart,omitempty"`
}

// Backend describes the backend for people, as the user would have typed it.
func (s Spec) Backend() string {
	switch {
	case s.Arg == "":
		return s.Kind
	case strings.HasPrefix(s.Arg, s.Kind) && strings.Contains(s.Arg, "://"): // a URI of its own
		return s.Arg
	}
	return s.Kind + " " + s.Arg
}

// system is the machine as it is to be controlled.
func (s Spec) system(store *Store) nbdnl.System {
	system := store.System()
	if s.Ioctl {
		system.Mode = nbdnl.ModeIoctl
	}
	return system
}
