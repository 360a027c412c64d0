package backends

import (
	"io"
	"strings"
)

// Caps is a set of the optional things a backend can do.
type Caps uint32

const (
	CapWrite        Caps = 1 << iota // io.WriterAt
	CapSync                          // Syncer
	CapFUA                           // FUAWriter
	CapTrim                          // Trimmer
	CapZero                          // Zeroer
	CapExtents                       // Extenter
	CapResize                        // Resizer
	CapReadTo                        // ReaderAtTo
	CapWriteFrom                     // WriterAtFrom
	CapReadContext                   // ReaderAtContext
	CapWriteContext                  // WriterAtContext
	CapCache                         // Cacher
	CapContexts                      // Contexter
)

// capsOfWriter are worth nothing on a device that cannot be written.
const capsOfWriter = CapSync | CapFUA | CapTrim | CapZero | CapResize | CapWriteFrom | CapWriteContext

// String lists the capabilities: "write,sync,trim".
func (c Caps) String() string {
	names := []string{
		"write", "sync", "fua", "trim", "zero", "extents", "resize",
		"readto", "writefrom", "readcontext", "writecontext", "cache", "contexts",
	}
	var have []string
	for i, name := range names {
		if c&(1<<i) != 0 {
			have = append(have, name)
		}
	}
	return strings.Join(have, ",")
}

// A Capper can do less than its methods promise: it wraps a backend that lacks
// some of them, or was opened read-only.
type Capper interface {
	// Caps returns what is really offered. It only ever takes away: a bit
	// without the method behind it counts for nothing. It does not change while
	// the backend is in use, because a device announces its abilities once.
	Caps() Caps
}

// A Device is a backend with its abilities sorted out: a nil field is not
// offered, and one that is not nil may be called.
type Device struct {
	Backend
	Caps Caps // one bit for each field below that is not nil

	WriterAt  io.WriterAt
	Syncer    Syncer
	FUAWriter FUAWriter
	Trimmer   Trimmer
	Zeroer    Zeroer
	Extenter  Extenter
	Resizer   Resizer
	ReadTo    ReaderAtTo
	WriteFrom WriterAtFrom

	ReadContext  ReaderAtContext
	WriteContext WriterAtContext

	Cacher    Cacher
	Contexter Contexter

	BlockSizes BlockSizes // zero where the backend has no opinion
}

// Probe finds out what b can do. It is called once when b is attached, since the
// answer is announced to the client and cannot change from then on. Nothing
// that changes content is offered without a WriterAt.
func Probe(b Backend) Device {
	d := Device{Backend: b}
	have := ^Caps(0)
	if c, ok := b.(Capper); ok {
		have = c.Caps()
	}
	if _, ok := b.(io.WriterAt); !ok || have&CapWrite == 0 {
		have &^= CapWrite | capsOfWriter
	}
	take(&d, b, have, CapWrite, &d.WriterAt)
	take(&d, b, have, CapSync, &d.Syncer)
	take(&d, b, have, CapFUA, &d.FUAWriter)
	take(&d, b, have, CapTrim, &d.Trimmer)
	take(&d, b, have, CapZero, &d.Zeroer)
	take(&d, b, have, CapExtents, &d.Extenter)
	take(&d, b, have, CapResize, &d.Resizer)
	take(&d, b, have, CapReadTo, &d.ReadTo)
	take(&d, b, have, CapWriteFrom, &d.WriteFrom)
	take(&d, b, have, CapReadContext, &d.ReadContext)
	take(&d, b, have, CapWriteContext, &d.WriteContext)
	take(&d, b, have, CapCache, &d.Cacher)
	take(&d, b, have, CapContexts, &d.Contexter)
	if s, ok := b.(BlockSizer); ok {
		d.BlockSizes = s.BlockSizes()
	}
	return d
}

// take fills one field of d if b has its methods and kept its bit.
func take[T any](d *Device, b Backend, have, bit Caps, field *T) {
	if v, ok := b.(T); ok && have&bit != 0 {
		*field = v
		d.Caps |= bit
	}
}
