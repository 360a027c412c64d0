package server

import (
	"github.com/nbdctl/nbdctl/server/internal/pace"
	"github.com/nbdctl/nbdctl/server/wire"
)

// maxInline is the longest request, in bytes, for which the connection's goroutine makes a plain
// call.
const maxInline = 1 << 20

// pace returns the pace of a request that is a plain call, or nil if it always goes to a worker:
// what makes data durable waits for a disk, what is very long is worth a worker in any case, and
// the backends that answer without blocking have refused to do so when anybody else gets to ask.
func (e *Export) pace(h *wire.Request) *pace.Pace {
	switch {
	case h.Length > maxInline:
		return nil
	case h.Command == wire.CmdRead && !e.can.readTo:
		return &e.paces.Read
	case e.can.durably(h):
		return nil
	case h.Command == wire.CmdWrite && !e.can.writeFrom:
		return &e.paces.Write
	case h.Command == wire.CmdTrim, h.Command == wire.CmdWriteZeroes && e.dev.Zeroer != nil:
		return &e.paces.Trim
	default:
		return nil
	}
}

// paceBytes is the length that a call is allowed time for. A range to trim is a number like any
// other.
func paceBytes(h wire.Request) int {
	if h.Command == wire.CmdRead || h.Command == wire.CmdWrite {
		return int(h.Length)
	}
	return 0
}
