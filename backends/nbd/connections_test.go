package nbd_test

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// several dials as many connections as the options say, to servers that speak a dialogue each. It
// returns the rigs of those connections.
func several(t *testing.T, o nbd.Options, f form, dialogue func(i int) []turn) (*nbd.Client, []*rig, error) {
	t.Helper()
	var rigs []*rig
	var spoken []chan error
	o.Dial = func(context.Context) (net.Conn, error) {
		client, server := net.Pipe()
		turns := dialogue(len(rigs))
		if turns == nil {
			return nil, net.ErrWriteToConnected
		}
		rigs = append(rigs, &rig{t: t, form: f, nc: server})
		said := make(chan error, 1)
		spoken = append(spoken, said)
		go func() { said <- speak(server, turns) }()
		return client, nil
	}
	c, err := nbd.URI{Network: "unix", Address: "/s", Export: "disk"}.Dial(t.Context(), o)
	for i, said := range spoken {
		rigs[i].c = c
		if wrong := <-said; wrong != nil {
			t.Error(wrong)
		}
		t.Cleanup(func() { rigs[i].nc.Close() })
	}
	if c != nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, rigs, err
}

// multi is a server that knows simple replies only, and promises that connections agree.
func multi(flags u16) []turn {
	return greeted(turn{info(optGo, "disk"), cat(sized(optGo, 1<<20, flags), answer(optGo, repAck))})
}

const canMulti u16 = 0x101 | 4 // and can flush

// An arrival is a request that has arrived on one of several connections.
type arrival struct {
	i int
	query
}

// arrivals receives what comes on all connections, until they end.
func arrivals(rigs []*rig) <-chan arrival {
	all := make(chan arrival, 100)
	for i, r := range rigs {
		go func() {
			for {
				q, err := r.receive()
				if err != nil {
					return
				}
				all <- arrival{i, q}
			}
		}()
	}
	return all
}

// TestConnections holds how many connections there are, that they take turns, and that they are
// told goodbye.
func TestConnections(t *testing.T) {
	for _, tt := range []struct {
		flags     u16
		ask, want int
	}{{canMulti, 0, 1}, {canMulti, 1, 1}, {canMulti, 3, 3}, {canMulti &^ 0x100, 3, 1}} {
		synctest.Test(t, func(t *testing.T) {
			c, rigs, err := several(t, nbd.Options{Connections: tt.ask, NoStructured: true}, simple,
				func(int) []turn { return multi(tt.flags) })
			if err != nil || c.Connections() != tt.want || len(rigs) != tt.want {
				t.Fatalf("%v, %d connections for %+v", err, len(rigs), tt)
			}
			arrived := make([]int, len(rigs))
			all := arrivals(rigs)
			for range 4 * len(rigs) {
				is := rigs[0].effect(c.Sync)
				a := <-all
				arrived[a.i]++
				rigs[a.i].say(rigs[a.i].ok(a.query))
				if got := <-is; got.err != nil {
					t.Error(got.err)
				}
			}
			for i, n := range arrived {
				if n != 4 {
					t.Errorf("connection %d has %d requests, want 4", i, n)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			clear(arrived)
			for range rigs {
				a := <-all
				if arrived[a.i]++; a.command != cmdDisc || arrived[a.i] > 1 {
					t.Errorf("connection %d ends with %+v", a.i, a.query)
				}
			}
		})
	}
}

// TestConnectionsDie holds that a connection that ends takes with it what is in flight on it, and
// that all else goes on while one is left.
func TestConnectionsDie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, rigs, err := several(t, nbd.Options{Connections: 3, NoStructured: true}, simple,
			func(int) []turn { return multi(canMulti) })
		if err != nil {
			t.Fatal(err)
		}
		all := arrivals(rigs)
		for dead := range rigs {
			waiting := make(map[int]<-chan result) // by the connection
			asked := make(map[int]query)
			for range 2 * len(rigs) { // The dead ones' turn comes, too.
				is := rigs[0].effect(c.Sync)
				a := <-all
				if a.i < dead {
					t.Errorf("connection %d has ended, and has a request", a.i)
				}
				if waiting[a.i] != nil {
					rigs[a.i].say(rigs[a.i].ok(a.query))
					if err := (<-is).err; err != nil {
						t.Error(err)
					}
					continue
				}
				waiting[a.i], asked[a.i] = is, a.query
			}
			rigs[dead].nc.Close()
			checkIs(t, (<-waiting[dead]).err, io.ErrUnexpectedEOF)
			for i := dead + 1; i < len(rigs); i++ {
				rigs[i].say(rigs[i].ok(asked[i]))
				if err := (<-waiting[i]).err; err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
			}
		}
		for range 5 {
			checkIs(t, c.Sync(), io.ErrUnexpectedEOF)
		}
		if err := c.Close(); err == nil || strings.Count(err.Error(), "lost before") != 3 {
			t.Errorf("Close: %v", err)
		}
	})
}

// TestConnectionsDiffer holds that no client has connections to exports that are not the same, nor
// one to a part of them.
func TestConnectionsDiffer(t *testing.T) {
	agreed := func(forms []turn, infos ...[]byte) []turn {
		says := sized(optGo, 1<<20, canMulti)
		for _, i := range infos {
			says = append(says, i...)
		}
		return greeted(append(forms, turn{info(optGo, "disk"), cat(says, answer(optGo, repAck))})...)
	}
	all := []turn{hasNoExtended, hasStructured, hasAllocation}
	for name, second := range map[string][]turn{
		"size":          agreed(all, sized(optGo, 1<<20+1, canMulti)),
		"flags":         agreed(all, sized(optGo, 1<<20, canMulti|2)),
		"name":          agreed(all, answer(optGo, repInfo, infoName, "disc")),
		"block sizes":   agreed(all, answer(optGo, repInfo, infoBlockSize, u32(512), u32(4096), u32(1<<20))),
		"no contexts":   agreed([]turn{hasNoExtended, hasStructured, hasNoContexts}),
		"no structure":  agreed([]turn{hasNoExtended, hasNoStructure}),
		"extended":      agreed([]turn{hasExtended, hasAllocation}),
		"refused":       greeted(turn{option(optExtended), answer(optExtended, refusedWithoutTLS)}),
		"no connection": nil,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, rigs, err := several(t, nbd.Options{Connections: 3}, structured, func(i int) []turn {
					if i == 1 {
						return second
					}
					return agreed(all)
				})
				if c != nil || err == nil {
					t.Fatalf("%v, %v", c, err)
				}
				if len(rigs) > 2 {
					t.Errorf("there were %d connections", len(rigs))
				}
				for i, r := range rigs {
					if n, err := r.nc.Read(make([]byte, 1)); err != io.EOF {
						t.Errorf("connection %d is open: %d, %v", i, n, err)
					}
				}
			})
		})
	}
}

// TestContextsOfConnections holds that a context may have another number on each connection.
func TestContextsOfConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ids := []u32{7, 0, 0xffffffff}
		c, rigs, err := several(t, nbd.Options{Connections: 3, Contexts: []string{dirty}}, extended,
			func(i int) []turn {
				return greeted(hasExtended, turn{contexts(optSetContexts, "disk", "base:allocation", dirty), cat(
					answer(optSetContexts, repContext, ids[i], "base:allocation"),
					answer(optSetContexts, repContext, ids[(i+1)%3], dirty), answer(optSetContexts, repAck))},
					turn{info(optGo, "disk"), cat(sized(optGo, 1<<20, canMulti), answer(optGo, repAck))})
			})
		if err != nil {
			t.Fatal(err)
		}
		all := arrivals(rigs)
		for range 6 {
			is := rigs[0].call(func() (n int, err error) {
				err = c.Extents(0, 1000, func(e backends.Extent) bool {
					if n += int(e.Length); !e.Zero || e.Hole {
						t.Errorf("%+v", e)
					}
					return true
				})
				return n, err
			})
			a := <-all
			r := rigs[a.i]
			r.say(r.status(a.query, 0, ids[a.i], 1000, 2), r.status(a.query, done, ids[(a.i+1)%3], 1000, 1))
			if got := <-is; got.err != nil || got.n != 1000 {
				t.Errorf("connection %d: %+v", a.i, got)
			}
		}
		is := rigs[0].effect(func() error { return c.Extents(0, 1000, func(backends.Extent) bool { return true }) })
		a := <-all
		r := rigs[a.i]
		r.say(r.status(a.query, done, ids[(a.i+2)%3], 1000, 2)) // It is one of another connection.
		checkBroken(t, (<-is).err, "not agreed on")
	})
}
