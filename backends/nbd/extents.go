package nbd

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// statuses keep their memory for the next one.
var statuses = sync.Pool{New: func() any { return new(status) }}

func (s Contexts) names() []string {
	var names []string
	for _, x := range s {
		names = append(names, x.Name)
	}
	return names
}

// named returns the number of a context.
func (s Contexts) named(name string) (id uint32, ok bool) {
	for _, x := range s {
		if x.Name == name {
			return x.ID, true
		}
	}
	return 0, false
}

// Extents implements backends.Extenter by the context base:allocation. It asks the server again
// until the range is covered, or yield returns false.
func (c *Client) Extents(off, n int64, yield func(backends.Extent) bool) error {
	return c.extents(wire.ContextAllocation, off, n, func(m backends.Mark) bool {
		return yield(backends.Extent{
			Offset: m.Offset, Length: m.Length, Hole: m.Flags&wire.StateHole != 0, Zero: m.Flags&wire.StateZero != 0,
		})
	})
}

// Contexts implements backends.Contexter: those that were agreed on, but for base:allocation.
func (c *Client) Contexts() []backends.Context {
	var all []backends.Context
	for _, x := range c.agreed.Contexts {
		if x.Name == wire.ContextAllocation {
			continue
		}
		// Those of QEMU have 32 bits by their definition (its docs/interop/nbd.txt). Of others a
		// client without extended headers can't know.
		wide := c.agreed.Extended && !strings.HasPrefix(x.Name, "qemu:")
		all = append(all, backends.Context{Name: x.Name, Wide: wide})
	}
	return all
}

// ContextExtents implements backends.Contexter, also for base:allocation. Neighbours may be alike.
func (c *Client) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	return c.extents(name, off, n, yield)
}

func (c *Client) extents(name string, off, n int64, yield func(backends.Mark) bool) error {
	if off < 0 || n < 0 || off > c.size || n > c.size-off {
		return c.refuse(wire.CmdBlockStatus, off, n)
	}
	if _, ok := c.agreed.Contexts.named(name); !ok {
		return fmt.Errorf("nbd: %q was not agreed on: %w", name, c.unsupported(wire.CmdBlockStatus, off, n))
	}
	st := statuses.Get().(*status)
	defer statuses.Put(st)
	st.context = name
	// The server is asked in whole blocks.
	unit := int64(max(c.agreed.BlockSizes.Minimum, 1))
	at := off &^ (unit - 1)
	end := off + n
	if rest := end & (unit - 1); rest > 0 {
		end += min(unit-rest, c.size-end)
	}
	most := c.mostEffect()
	for at < end {
		piece := min(end-at, most)
		err := c.do(context.Background(), &request{command: wire.CmdBlockStatus, off: at, n: piece, status: st})
		if tooLong(err) && piece > c.longest {
			most = c.longest
			continue
		}
		if err != nil {
			return err
		}
		for _, e := range st.extents {
			length := int64(min(e.length, uint64(end-at))) // The last one may reach beyond the range.
			from, to := max(at, off), min(at+length, off+n)
			if from < to && !yield(backends.Mark{Offset: from, Length: to - from, Flags: e.flags}) {
				return nil
			}
			if at += length; at == end {
				break
			}
		}
	}
	return nil
}
