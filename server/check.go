package server

import (
	"syscall"

	"github.com/nbdctl/nbdctl/server/wire"
)

// Refusals, by the rules of the NBD protocol document ("Request types", "Error values").
var (
	errUnknownOp   = &refusal{syscall.EINVAL, "unknown request type"}
	errUnknownFlag = &refusal{syscall.EINVAL, "flag unknown, or not for this request type"}
	errReadOnly    = &refusal{syscall.EPERM, "the export is read-only"}
	errNotOffered  = &refusal{syscall.EINVAL, "trim was not offered"}
	errNotFast     = &refusal{syscall.EOPNOTSUPP, "zeroes are no quicker than a write"}
	errTooLong     = &refusal{syscall.EINVAL, "longer than the longest request allowed"}
	errUnaligned   = &refusal{syscall.EINVAL, "offset and length must be multiples of the block size"}
	errPastEnd     = &refusal{syscall.EINVAL, "past the end of the export"}
	errNoRoom      = &refusal{syscall.ENOSPC, "past the end of the export"}
	errNoCache     = &refusal{syscall.EINVAL, "cache was not offered"}
	errNoChoice    = &refusal{syscall.EINVAL, "the payload is no choice among the meta contexts"}
	errNoContext   = &refusal{syscall.EINVAL, "no meta context was negotiated"}
	errNothing     = &refusal{syscall.EINVAL, "the status of no bytes"}
	errFlushRange  = &refusal{syscall.EINVAL, "offset and length of a flush must be zero"}
)

// check returns nil if the request may reach the backend, of a client with that agreement.
func (e *Export) check(h wire.Request, a *Agreement) *refusal {
	// FUA is good with every request type, also where it means nothing.
	known := wire.CmdFlagFUA
	switch h.Command {
	case wire.CmdRead:
		if a.Structured {
			known |= wire.CmdFlagDF
		}
	case wire.CmdWrite:
		if a.Extended {
			known |= wire.CmdFlagPayloadLen
		}
	case wire.CmdFlush, wire.CmdTrim, wire.CmdCache:
	case wire.CmdWriteZeroes:
		known |= wire.CmdFlagNoHole
		if e.flags&wire.FlagSendFastZero != 0 {
			known |= wire.CmdFlagFastZero
		}
	case wire.CmdBlockStatus:
		known |= wire.CmdFlagReqOne // and CmdFlagPayloadLen, which choose has taken away
	default:
		return errUnknownOp
	}
	writes := h.Command == wire.CmdWrite || h.Command == wire.CmdTrim || h.Command == wire.CmdWriteZeroes
	switch {
	case h.Flags&^known != 0:
		return errUnknownFlag
	case h.Command == wire.CmdBlockStatus && len(a.Contexts) == 0:
		return errNoContext
	case writes && e.flags&wire.FlagReadOnly != 0:
		return errReadOnly
	case h.Command == wire.CmdTrim && e.flags&wire.FlagSendTrim == 0:
		return errNotOffered
	case h.Command == wire.CmdCache && e.flags&wire.FlagSendCache == 0:
		return errNoCache
	case h.Command == wire.CmdBlockStatus && h.Length == 0:
		return errNothing
	case h.Command == wire.CmdFlush && (h.Offset != 0 || h.Length != 0):
		return errFlushRange
	case (h.Command == wire.CmdRead || h.Command == wire.CmdWrite) && h.Length > e.maxLength:
		return errTooLong
	case (h.Offset|h.Length)&uint64(e.blockSize-1) != 0:
		return errUnaligned
	}
	// Both sides of the second comparison are at most the size: no sum that could wrap around.
	if size := uint64(e.size.Load()); h.Offset > size || h.Length > size-h.Offset {
		if h.Command == wire.CmdWrite || h.Command == wire.CmdWriteZeroes {
			return errNoRoom
		}
		return errPastEnd
	}
	return nil
}
