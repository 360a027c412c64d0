package host

import "time"

// A Remote is what a process knows of a backend that is reached over connections which can be lost.
type Remote struct {
	// Wait is how long a request may wait for a connection, beyond what it takes otherwise.
	Wait time.Duration
	// Changed has a value when State has changed.
	Changed <-chan struct{}
	// State tells how it is connected.
	State func() RemoteState
	// GiveUp ends all requests, also those that wait for a connection. There is no way back.
	GiveUp func()
}

// A RemoteState is how a backend elsewhere is connected. It is part of records and of --json.
type RemoteState struct {
	// Way is "relay": requests pass through the serving process.
	Way string `json:"way"`
	// Replies is the form in which the server replies: "extended", "structured" or "simple".
	Replies     string `json:"replies"`
	TLS         bool   `json:"tls"`
	Connections int    `json:"connections"`
	Alive       int    `json:"connections_alive"`
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

// timeout is how long the kernel has to wait for an answer, if the server may take t: it is given
// up some time after t, its connection replaced within Wait, and the request made again.
func (r *Remote) timeout(t time.Duration) time.Duration {
	if r == nil {
		return t
	}
	return 2*t + r.Wait
}

// state returns how the backend is connected; nil if it is here.
func (r *Remote) state() *RemoteState {
	if r == nil {
		return nil
	}
	s := r.State()
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
