package host

import (
	"time"

	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A Remote is what a process knows of a backend that is reached over connections which can be lost.
type Remote struct {
	// Wait is how long a request may wait for a connection, beyond what it takes otherwise.
	Wait time.Duration
	// Export is what the kernel speaks with itself; nil: requests pass through the serving process.
	Export blockdev.Remote
	// Changed has a value when State has changed; nil: its device tells.
	Changed <-chan struct{}
	// State tells how it is connected, as a backend of the device.
	State func(*blockdev.Device) RemoteState
	// GiveUp ends all requests, also those that wait for a connection. There is no way back. nil:
	// the device has them all.
	GiveUp func()
}

// Direct and Relay are ways to be connected.
const (
	Direct = "direct" // the kernel speaks with the server
	Relay  = "relay"  // requests pass through the serving process
)

// A RemoteState is how a backend elsewhere is connected. It is part of records and of --json.
type RemoteState struct {
	// Way is Direct or Relay.
	Way string `json:"way"`
	// Replies is the form in which the server replies: "extended", "structured" or "simple".
	Replies     string `json:"replies"`
	TLS         bool   `json:"tls"`
	Connections int    `json:"connections"`
	Alive       int    `json:"connections_alive"`
	// BlockSize is that of the server in bytes, of which its requests are multiples. Where it is
	// larger than that of the device, parts of blocks are written by the serving process.
	BlockSize int `json:"block_size"`
	// LostSince is since when there is no connection; nil: there is one.
	LostSince *time.Time `json:"lost_since"`
	// Error is why the last one was lost, or why the last attempt to replace it has failed.
	Error *string `json:"error"`
	// Replaced is how many connections were.
	Replaced int64 `json:"replaced"`
}

// changed is a channel of changes; nil if there is no remote.
func (r *Remote) changed() <-chan struct{} {
	if r == nil {
		return nil
	}
	return r.Changed
}

// direct reports whether the kernel speaks with the server.
func (r *Remote) direct() bool { return r != nil && r.Export != nil }

// way is Direct or Relay.
func (r *Remote) way() string {
	if r.direct() {
		return Direct
	}
	return Relay
}

// timeout is how long the kernel has to wait for an answer, if the server may take t: of a relay,
// it is given up some time after t, its connection replaced within Wait, and the request made
// again.
func (r *Remote) timeout(t time.Duration) time.Duration {
	if r == nil || r.direct() {
		return t
	}
	return 2*t + r.Wait
}

// state returns how the backend of a device is connected; nil if it is here.
func (r *Remote) state(device *blockdev.Device) *RemoteState {
	if r == nil {
		return nil
	}
	s := r.State(device)
	return &s
}

// phase is that of the device, of which p is what the kernel's side of it is in.
func (s *RemoteState) phase(p Phase) Phase {
	switch {
	case s == nil || p != PhaseLive || s.Alive == s.Connections:
		return p
	case s.Alive == 0:
		return PhaseWaiting
	}
	return PhaseDegraded
}

// Lost notes since when there is no connection, if there is none, and what is wrong, if anything
// is.
func (s *RemoteState) Lost(since time.Time, err error) {
	if !since.IsZero() {
		s.LostSince = &since
	}
	if err != nil {
		text := err.Error()
		s.Error = &text
	}
}
