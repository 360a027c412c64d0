package server_test

import (
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A markedDisk is a holeyDisk with contexts of its own: which page it is, and the same in flags of
// 64 bits.
type markedDisk struct {
	*holeyDisk
	contexts []backends.Context
	flags    atomic.Uint64 // beside the number of the page
	fails    atomic.Bool
}

func marked() *markedDisk {
	contexts := []backends.Context{{Name: "x-test:page"}, {Name: "x-test:wide", Wide: true}}
	return &markedDisk{holeyDisk: holey(), contexts: contexts}
}

func (d *markedDisk) Contexts() []backends.Context { return d.contexts }

func (d *markedDisk) ContextExtents(name string, off, n int64, yield func(backends.Mark) bool) error {
	if d.fails.Load() {
		return syscall.EIO
	}
	for n > 0 {
		m := backends.Mark{Offset: off, Length: min(n, page-off%page), Flags: d.flags.Load() | uint64(off/page)}
		if name == "x-test:wide" {
			m.Flags |= 1 << 40
		}
		if !yield(m) {
			break
		}
		off, n = off+m.Length, n-m.Length
	}
	return nil
}

// TestContextsChosen holds which contexts of a backend a client gets ("Metadata querying").
func TestContextsChosen(t *testing.T) {
	const alloc, one, wide = "base:allocation", "x-test:page", "x-test:wide"
	for _, tt := range []struct {
		extended, list bool
		queries        string
		want           string // numbers and names
	}{
		{list: true, want: "0 base:allocation, 0 x-test:page"},
		{list: true, extended: true, want: "0 base:allocation, 0 x-test:page, 0 x-test:wide"},
		{list: true, extended: true, queries: "x-test:", want: "0 x-test:page, 0 x-test:wide"},
		{list: true, extended: true, queries: "x-test", want: ""},
		{queries: "", want: ""},
		{queries: "x-test:", want: ""},
		{queries: wide + " " + one + " " + alloc, want: "1 base:allocation, 2 x-test:page"},
		{extended: true, queries: wide + " " + wide, want: "3 x-test:wide"},
	} {
		opt, form := uint32(optSetMeta), uint32(optStructured)
		if tt.list {
			opt = optListMeta
		}
		if tt.extended {
			form = optExtended
		}
		asked := option(opt, metaData("x", strings.Fields(tt.queries)...))
		c := &talker{in: strings.NewReader(clientFlags(3) + option(form, "") + asked + option(optGo, infoData("x")))}
		s := &server.Server{Exports: map[string]*server.Export{"x": export(t, marked(), server.Options{})}}
		session, err := s.Handshake(c)
		if err != nil {
			t.Fatal(err)
		}
		session.Conn().Close()
		want, agreed := "", []string{}
		for _, c := range strings.Split(tt.want, ", ") {
			if id, name, ok := strings.Cut(c, " "); ok {
				want += optionReply(opt, repMetaContext, "\x00\x00\x00"+string(id[0]-'0')+name)
				agreed = append(agreed, c)
			}
		}
		want = greeting + optionReply(form, repAck, "") + want + optionReply(opt, repAck, "")
		if got := c.out.String(); !strings.HasPrefix(got, want) {
			t.Errorf("%+v (-want +got):\n%s", tt, cmp.Diff(want, got))
		}
		got := []string{}
		for _, c := range session.Agreement.Contexts {
			got = append(got, fmt.Sprint(c.ID, " ", c.Name))
		}
		if diff := cmp.Diff(agreed, got); diff != "" && !tt.list {
			t.Errorf("%+v: agreed on (-want +got):\n%s", tt, diff)
		}
		// Another process has the same.
		ours, theirs := net.Pipe()
		resumed, err := s.Resume(theirs, session.Agreement, nil)
		if err != nil {
			t.Fatal(err)
		}
		resumed.Conn().Close()
		ours.Close()
	}
}

// TestContexts holds what is told of several contexts at once, a chunk for each
// ("NBD_CMD_BLOCK_STATUS"), of backends that no dialogue has.
func TestContexts(t *testing.T) {
	d := marked()
	options := []string{option(optExtended, ""), option(optSetMeta,
		metaData("x", "x-test:wide", "base:allocation", "x-test:page"))}
	of := func(id uint32, extents ...uint64) chunk {
		c := statusExt(extents...)
		return chunk{c.Type, be32(id) + c.Payload[4:]}
	}
	nc := withOptions(t, d, server.Options{}, options...)
	ask := func(q call, n uint64, want ...chunk) {
		t.Helper()
		q.op = cmdBlockStatus
		nc.Write(q.encodeExtended(7, n))
		got, err := readExtended(nc, 7, q.offset)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%+v: %v (-want +got):\n%s", q, err, diff)
		}
	}
	const high = 1 << 40
	d.fails.Store(true)
	ask(call{}, page, failure(eio, ""))
	d.fails.Store(false)
	ask(call{offset: 7 * page}, page, of(1, page, 0), of(2, page, 7), of(3, page, high|7))

	// Blocks that are larger than pieces are what they begin with.
	nc = withOptions(t, d, server.Options{BlockSize: 4 * page}, options...)
	ask(call{}, 8*page, of(1, 8*page, 0), of(2, 4*page, 0, 4*page, 4), of(3, 4*page, high, 4*page, high|4))

	// A compact header has no room for what is not to be there.
	d.flags.Store(high)
	nc = withOptions(t, d, server.Options{}, option(optStructured, ""),
		option(optSetMeta, metaData("x", "x-test:page")))
	nc.Write(call{op: cmdBlockStatus, length: page}.encode(1))
	got, err := readChunks(nc, 1)
	if diff := cmp.Diff([]chunk{failure(eio, "")}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// TestContextsRefused holds which contexts a backend can't have, and that none goes away.
func TestContextsRefused(t *testing.T) {
	many := make([]backends.Context, backends.MaxContexts+1)
	for i := range many {
		many[i].Name = fmt.Sprintf("x-test:%d", i)
	}
	for name, contexts := range map[string][]backends.Context{
		"base":         {{Name: "base:more"}},
		"no namespace": {{Name: ":x"}},
		"no leaf":      {{Name: "x:"}},
		"no colon":     {{Name: "x"}},
		"twice":        {{Name: "x:y"}, {Name: "x:y", Wide: true}},
		"not UTF-8":    {{Name: "x:\xff"}},
		"too many":     many,
	} {
		d := marked()
		d.contexts = contexts
		if _, err := server.NewExport(d, server.Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	d := marked()
	d.contexts = many[1:]
	if _, err := server.NewExport(d, server.Options{}); err != nil {
		t.Error(err)
	}

	e := export(t, marked(), server.Options{})
	without, wide := marked(), marked()
	without.contexts = wide.contexts[1:]
	wide.contexts = []backends.Context{{Name: "x-test:page", Wide: true}, {Name: "x-test:wide"}}
	for name, b := range map[string]backends.Backend{"nothing": holey(), "one of two": without, "wide": wide} {
		err := e.Swap(t.Context(), b)
		if err == nil || !strings.Contains(err.Error(), `no meta context "x-test:page"`) {
			t.Errorf("swap to a backend with %s: %v", name, err)
		}
	}
	if err := e.Swap(t.Context(), marked()); err != nil {
		t.Error(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{"x": e}}
	agreed := server.Agreement{Export: "x", Size: e.Size(), BlockSize: 1, Flags: e.Flags(), Structured: true,
		Contexts: []server.Context{{ID: 3, Name: "x-test:wide"}}}
	_, theirs := net.Pipe()
	if _, err := s.Resume(theirs, agreed, nil); err == nil || !strings.Contains(err.Error(), "x-test:wide") {
		t.Errorf("wide flags for a client with compact headers: %v", err)
	}
}
