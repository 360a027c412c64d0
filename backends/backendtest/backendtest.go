package backendtest

import (
	"math/rand/v2"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

// Options of Test. The zero value is ready to use.
type Options struct {
	// Seed of everything random; 0 picks one. It is logged either way.
	Seed uint64

	// Operations is how many requests a random check makes; 0 is 1000.
	Operations int

	// TrimZeroes says that trimmed ranges read as zeros, which the contract
	// leaves open.
	TrimZeroes bool

	// Reopen closes b and opens what it had stored, dropping as much as it can of
	// what was not synced, as a crash would. nil: content does not outlive a
	// backend.
	Reopen func(t testing.TB, b backends.Backend) backends.Backend

	// Stall makes what b waits for hang until release is called, such as a server
	// across a network. It is to show that calls end with their context. nil:
	// they are made on a backend that answers.
	Stall func(t testing.TB, b backends.Backend) (release func())
}

// Test checks the backends that open returns. Every check opens its own, so open
// leaves the closing to t.Cleanup; it fails the test if it cannot open. Up to
// 4 MiB of each are used, half of them at its end.
func Test(t *testing.T, open func(t testing.TB) backends.Backend, opts Options) {
	t.Helper()
	if opts.Seed == 0 {
		opts.Seed = rand.Uint64()
	}
	t.Logf("backendtest: seed %d", opts.Seed)
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, open(t), opts)
		})
	}
}

// A check is one part of the contract.
type check struct {
	name  string
	needs backends.Caps
	run   func(*subject)
}

var checks = []check{
	{"Promises", 0, checkPromises},
	{"ReadEdges", 0, checkReadEdges},
	{"ConcurrentReads", 0, checkConcurrentReads},
	{"ReadTo", backends.CapReadTo, checkReadTo},
	{"ReadContext", backends.CapReadContext, checkReadContext},
	{"Extents", backends.CapExtents, checkExtents},
	{"Cache", backends.CapCache, checkCache},
	{"Contexts", backends.CapContexts, checkContexts},
	{"WriteEdges", backends.CapWrite, checkWriteEdges},
	{"Random", backends.CapWrite, checkRandom},
	{"Zero", backends.CapZero, checkZero},
	{"Trim", backends.CapTrim, checkTrim},
	{"WriteFrom", backends.CapWriteFrom, checkWriteFrom},
	{"WriteContext", backends.CapWriteContext, checkWriteContext},
	{"Neighbours", backends.CapWrite, checkNeighbours},
	{"Overlaps", backends.CapWrite, checkOverlaps},
	{"Durability", backends.CapWrite, checkDurability},
	{"Resize", backends.CapResize, checkResize},
}

func (c check) test(t testing.TB, b backends.Backend, opts Options) {
	t.Helper()
	if opts.Operations == 0 {
		opts.Operations = 1000
	}
	s := newSubject(t, b, opts)
	if missing := c.needs &^ s.dev.Caps; missing != 0 {
		t.Skipf("not offered: %v", missing)
	}
	if s.size < s.unit {
		t.Fatalf("a backend of %d bytes with requests of at least %d has nothing to check", s.size, s.unit)
	}
	c.run(s)
}
