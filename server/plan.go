package server

import (
	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A plan is how the loop carries out a request. It is made before anything is done, from the
// request, what the backend can do, and the situation: nothing else decides which executor has it.
type plan uint8

const (
	planCut       plan = iota // not at all: the peer breaks the protocol, and the connection ends
	planRefuse                // with an error, once its payload, if it has one, has left the stream
	planNothing               // with success: the request asks for nothing
	planGather                // by another plan, as soon as the payload is in the inbox
	planReadTo                // by the backend, which puts what it has into the batch
	planRead                  // by a plain call of the loop, into the batch
	planWriteFrom             // by the backend, which takes the payload from where it is
	planWrite                 // by a plain call of the loop, from the inbox
	planStart                 // with memory of its own, as a request that does not belong to the batch
)

// abilities are what plans ask of a backend.
type abilities struct {
	readTo    bool // backends.ReaderAtTo
	writeFrom bool // backends.WriterAtFrom
	syncs     bool // backends.Syncer
	durable   bool // it makes a difference to a write whether it is durable
}

func abilitiesOf(d *backends.Device) abilities {
	return abilities{
		readTo:    d.ReadTo != nil,
		writeFrom: d.WriteFrom != nil,
		syncs:     d.Syncer != nil,
		durable:   d.Syncer != nil || d.FUAWriter != nil,
	}
}

// durably reports whether the request asks for more than the backend's plain calls give.
func (a abilities) durably(h *wire.Request) bool { return a.durable && h.Flags&wire.CmdFlagFUA != 0 }

// A situation is what a plan depends on beside the request and the backend.
type situation struct {
	payload uint64 // how many bytes follow the request
	refused bool   // the request does not reach the backend
	inline  bool   // the loop makes plain calls of this kind
	arrived bool   // the payload of a WRITE is in the inbox
	room    bool   // in the inbox, for the payload of a WRITE
	counted bool   // memory for payloads is, over all clients
}

// gathers reports whether the payload of a WRITE is best received into the inbox, whatever its
// size: where the backend takes it from there, without another goroutine. Then a burst of large
// writes takes few system calls, too.
func (s situation) gathers() bool { return s.inline && s.room }

// planOf returns the plan for a request.
func planOf(h *wire.Request, a abilities, s situation) plan {
	if s.payload > wire.MaxPayload {
		// No memory for it, and skipping up to 2⁶⁴ bytes is no way to treat such a peer.
		return planCut
	}
	if h.Command == wire.CmdWrite {
		return planOfWrite(h, a, s)
	}
	switch {
	case s.refused:
		return planRefuse
	case h.Command == wire.CmdFlush:
		if a.syncs {
			return planStart
		}
		return planNothing
	case h.Length == 0:
		return planNothing
	case h.Command != wire.CmdRead:
		return planStart
	case a.readTo:
		return planReadTo
	case s.inline && h.Length <= slabSize:
		return planRead
	default:
		return planStart
	}
}

func planOfWrite(h *wire.Request, a abilities, s situation) plan {
	switch {
	case s.refused:
		return planRefuse
	case h.Length == 0:
		return planNothing
	case !s.arrived && s.gathers():
		return planGather
	case a.durably(h):
		return planStart
	case a.writeFrom && (s.arrived || h.Length <= maxKept || !s.counted):
		return planWriteFrom
	case s.inline && s.arrived:
		return planWrite
	default:
		return planStart
	}
}
