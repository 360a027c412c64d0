package server

import "syscall"

// Refusals, by the rules of the NBD protocol document ("Request types", "Error values").
var (
	errUnknownOp   = &refusal{syscall.EINVAL, "unknown request type"}
	errUnknownFlag = &refusal{syscall.EINVAL, "flag unknown, or not for this request type"}
	errReadOnly    = &refusal{syscall.EPERM, "the export is read-only"}
	errNotOffered  = &refusal{syscall.EINVAL, "trim was not offered"}
	errTooLong     = &refusal{syscall.EINVAL, "longer than the longest request allowed"}
	errUnaligned   = &refusal{syscall.EINVAL, "offset and length must be multiples of the block size"}
	errPastEnd     = &refusal{syscall.EINVAL, "past the end of the export"}
	errNoRoom      = &refusal{syscall.ENOSPC, "past the end of the export"}
	errFlushRange  = &refusal{syscall.EINVAL, "offset and length of a flush must be zero"}
)

// check returns nil if the request may reach the backend.
func (e *Export) check(h header) *refusal {
	// FUA is good with every request type, also where it means nothing.
	known := flagFUA
	switch h.op {
	case OpRead, OpWrite, OpFlush, OpTrim:
	case OpWriteZeroes:
		known |= flagNoHole
	default:
		return errUnknownOp
	}
	writes := h.op == OpWrite || h.op == OpTrim || h.op == OpWriteZeroes
	switch {
	case h.flags&^known != 0:
		return errUnknownFlag
	case writes && e.flags&FlagReadOnly != 0:
		return errReadOnly
	case h.op == OpTrim && e.flags&FlagSendTrim == 0:
		return errNotOffered
	case h.op == OpFlush && (h.offset != 0 || h.length != 0):
		return errFlushRange
	case (h.op == OpRead || h.op == OpWrite) && h.length > e.maxLength:
		return errTooLong
	case (h.offset|uint64(h.length))&uint64(e.blockSize-1) != 0:
		return errUnaligned
	}
	// Both sides of the second comparison are at most the size: no sum that could wrap around.
	if size := uint64(e.size.Load()); h.offset > size || uint64(h.length) > size-h.offset {
		if h.op == OpWrite || h.op == OpWriteZeroes {
			return errNoRoom
		}
		return errPastEnd
	}
	return nil
}
