package nbd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// The turns that a client takes who asks for the most, with servers that have it or do not.
var (
	hasExtended    = turn{option(optExtended), answer(optExtended, repAck)}
	hasNoExtended  = turn{option(optExtended), answer(optExtended, refusedUnsupported, "what is that?")}
	hasStructured  = turn{option(optStructured), answer(optStructured, repAck)}
	hasNoStructure = turn{option(optStructured), answer(optStructured, refusedUnsupported)}
	hasAllocation  = turn{contexts(optSetContexts, "disk", "base:allocation"), cat(
		answer(optSetContexts, repContext, u32(7), "base:allocation"), answer(optSetContexts, repAck))}
	hasNoContexts = turn{contexts(optSetContexts, "disk", "base:allocation"),
		answer(optSetContexts, refusedUnsupported)}
	hasGo = turn{info(optGo, "disk"),
		cat(sized(optGo, 4096, 1), answer(optGo, repInfo, infoDescription, "a disk"),
			answer(optGo, repInfo, infoBlockSize, u32(512), u32(4096), u32(1<<20)), answer(optGo, repAck))}
	hasNoGo       = turn{info(optGo, "disk"), answer(optGo, refusedUnsupported)}
	hasExportName = turn{option(optExportName, "disk"), cat(u64(4096), u16(1))}
	isLeft        = turn{request(simple, 0, cmdDisc, 0, 0, 0), nil}
	isLeftLong    = turn{request(extended, 0, cmdDisc, 0, 0, 0), nil}
)

// dialogues are whole ones that New makes, and what is agreed on.
var dialogues = []struct {
	name    string
	turns   []turn
	options nbd.Options
	want    nbd.Agreement
}{
	{"all that there is", greeted(hasExtended, hasAllocation, hasGo, isLeftLong), nbd.Options{},
		nbd.Agreement{Structured: true, Extended: true, Contexts: nbd.Contexts{{Name: "base:allocation", ID: 7}}}},
	{"no extended headers", greeted(hasNoExtended, hasStructured, hasAllocation, hasGo, isLeft), nbd.Options{},
		nbd.Agreement{Structured: true, Contexts: nbd.Contexts{{Name: "base:allocation", ID: 7}}}},
	{"no contexts", greeted(hasNoExtended, hasStructured, hasNoContexts, hasGo, isLeft), nbd.Options{},
		nbd.Agreement{Structured: true}},
	{"simple replies", greeted(hasNoExtended, hasNoStructure, hasGo, isLeft), nbd.Options{}, nbd.Agreement{}},
	{"no GO", greeted(hasNoExtended, hasNoStructure, hasNoGo, hasExportName, isLeft), nbd.Options{}, nbd.Agreement{}},
	{"no GO, and structured replies",
		greeted(hasNoExtended, hasStructured, hasAllocation, hasNoGo, hasExportName, isLeft), nbd.Options{},
		nbd.Agreement{Structured: true, Contexts: nbd.Contexts{{Name: "base:allocation", ID: 7}}}},
	{"no GO, and zeroes", append(opening(1), hasNoExtended, hasNoStructure, hasNoGo,
		turn{hasExportName.hears, cat(hasExportName.says, make([]byte, 124))}, isLeft), nbd.Options{}, nbd.Agreement{}},
	{"not fixed", append(opening(0), turn{hasExportName.hears, cat(hasExportName.says, make([]byte, 124))}, isLeft),
		nbd.Options{}, nbd.Agreement{}},
	{"not fixed, without zeroes", append(opening(2), hasExportName, isLeft), nbd.Options{}, nbd.Agreement{}},
	{"extended headers are not wanted", greeted(hasStructured, hasAllocation, hasGo, isLeft),
		nbd.Options{NoExtended: true},
		nbd.Agreement{Structured: true, Contexts: nbd.Contexts{{Name: "base:allocation", ID: 7}}}},
	{"structured replies are not wanted", greeted(hasGo, isLeft), nbd.Options{NoStructured: true}, nbd.Agreement{}},
	{"contexts are wanted, some of them twice", greeted(hasExtended,
		turn{contexts(optSetContexts, "disk", "base:allocation", "a:b", "c:d"), cat(
			answer(optSetContexts, repContext, u32(2), "c:d"), answer(optSetContexts, repAck))}, hasGo, isLeftLong),
		nbd.Options{Contexts: []string{"a:b", "base:allocation", "a:b", "c:d"}},
		nbd.Agreement{Structured: true, Extended: true, Contexts: nbd.Contexts{{Name: "c:d", ID: 2}}}},
}

// TestNew holds what a client says from the beginning to the end, with all kinds of servers.
func TestNew(t *testing.T) {
	for _, tt := range dialogues {
		t.Run(tt.name, func(t *testing.T) {
			talk(t, tt.turns, false, func(t *testing.T, nc net.Conn) {
				c, err := nbd.New(context.Background(), nc, "disk", tt.options)
				if err != nil {
					t.Fatal(err)
				}
				tt.want.Name, tt.want.Size, tt.want.Flags = "disk", 4096, 1
				got := c.Agreement()
				got.Description, got.BlockSizes = "", tt.want.BlockSizes
				if diff := cmp.Diff(tt.want, got, cmpopts.IgnoreUnexported(nbd.Info{})); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestNewRefused holds that every refusal counts that leaves nothing to agree on, that a client
// goes on without what it can do without, and that it hangs up otherwise.
func TestNewRefused(t *testing.T) {
	refuse := func(of turn, o, number u32) turn { return turn{of.hears, answer(o, number)} }
	check := func(name string, fails bool, want error, turns ...turn) {
		t.Run(name, func(t *testing.T) {
			talk(t, greeted(turns...), false, func(t *testing.T, nc net.Conn) {
				c, err := nbd.New(context.Background(), nc, "disk", nbd.Options{})
				if !fails && err == nil {
					c.Close()
					return
				}
				if c != nil || !errors.As(err, new(*nbd.OptionError)) {
					t.Errorf("%v: %v", c, err)
				}
				checkMatches(t, err, want)
				if _, err := nc.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("the connection is open: %v", err)
				}
			})
		})
	}
	for _, r := range refusals {
		required := r.number == refusedWithoutTLS // Whatever is asked for then is refused.
		behind := func(refused turn, others ...turn) []turn {
			if required {
				return []turn{refused}
			}
			return append([]turn{refused}, others...)
		}
		check("extended headers "+r.says, required, r.is,
			behind(refuse(hasExtended, optExtended, r.number), hasStructured, hasAllocation, hasGo, isLeft)...)
		check("structured replies "+r.says, required, r.is, append([]turn{hasNoExtended},
			behind(refuse(hasStructured, optStructured, r.number), hasGo, isLeft)...)...)
		check("contexts "+r.says, required, r.is, append([]turn{hasExtended},
			behind(refuse(hasAllocation, optSetContexts, r.number), hasGo, isLeftLong)...)...)
		// Behind extended headers there is no EXPORT_NAME.
		check("GO "+r.says, true, r.is, hasExtended, hasAllocation, refuse(hasGo, optGo, r.number))
		if !errors.Is(r.is, errors.ErrUnsupported) {
			check("GO of structured replies "+r.says, true, r.is, hasNoExtended, hasStructured, hasAllocation,
				refuse(hasGo, optGo, r.number))
		}
	}
}
