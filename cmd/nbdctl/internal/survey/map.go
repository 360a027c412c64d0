package survey

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A Piece is a range of an export that is alike in a meta context.
type Piece struct {
	Offset int64  `json:"offset"` // in bytes
	Length int64  `json:"length"`
	Flags  uint64 `json:"flags"`
	// Meaning is that of the flags, where the context is known.
	Meaning *string `json:"meaning"`
}

// Map calls yield for the pieces of an export, in ascending order, each of which differs from the
// next.
//
// The server may be silent for patience at most. Map ends with ctx.
func Map(ctx context.Context, u nbd.URI, name string, patience time.Duration, yield func(Piece) error) error {
	o := nbd.Options{ReadOnly: true, Timeout: patience}
	if name != wire.ContextAllocation {
		o.Contexts = []string{name}
	}
	dialling, cancel := withPatience(ctx, u, patience)
	defer cancel()
	c, err := u.Dial(dialling, o)
	if err != nil {
		return Explain(err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	a := c.Agreement()
	agreed := false
	for _, x := range a.Contexts {
		agreed = agreed || x.Name == name
	}
	if !agreed {
		return exit.With(exit.NotFound, "export %q of %v has no meta context %q; nbdctl info shows which it has",
			u.Export, u, name)
	}
	var last Piece
	var failed error
	err = c.ContextExtents(name, 0, c.Size(), func(m backends.Mark) bool {
		if last.Length > 0 && last.Flags == m.Flags {
			last.Length += m.Length
			return true
		}
		if last.Length > 0 {
			failed = yield(last)
		}
		last = Piece{Offset: m.Offset, Length: m.Length, Flags: m.Flags, Meaning: meaning(name, m.Flags)}
		return failed == nil
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case failed != nil:
		return failed
	case err != nil:
		return Explain(err)
	}
	if last.Length > 0 {
		return yield(last)
	}
	return nil
}

// meaning is that of flags: "Metadata querying" of the protocol document, and docs/interop/nbd.txt
// of QEMU.
func meaning(context string, flags uint64) *string {
	var s string
	switch {
	case context == wire.ContextAllocation:
		s = [...]string{"data", "hole", "zero", "hole,zero"}[flags&(wire.StateHole|wire.StateZero)]
	case strings.HasPrefix(context, "qemu:dirty-bitmap:"):
		s = [...]string{"clean", "dirty"}[flags&1]
	case context == "qemu:allocation-depth" && flags == 0:
		s = "unallocated"
	case context == "qemu:allocation-depth" && flags == 1:
		s = "local"
	case context == "qemu:allocation-depth":
		s = fmt.Sprintf("backing depth %d", flags)
	default:
		return nil
	}
	return &s
}
