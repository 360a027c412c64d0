package nbd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// nowhere is where no server is.
var nowhere = nbd.URI{Network: "unix", Address: "/nowhere", Export: "disk"}

// document is one of a client whose connections did not come along.
func document(connections int) nbd.Document {
	d := nbd.Document{
		Version: nbd.DocumentVersion,
		Agreement: nbd.Agreement{
			Info: nbd.Info{Name: "disk", Size: 1 << 20, Flags: wire.FlagHasFlags | wire.FlagCanMultiConn},
		},
	}
	for range connections {
		d.Connections = append(d.Connections, nbd.HandedConnection{Dead: true})
	}
	return d
}

// TestInheritNonsense holds that documents are refused which no client can have written, with a
// sentence that says why, and that their files are closed.
func TestInheritNonsense(t *testing.T) {
	reconnect := nbd.Options{Reconnect: quick()}
	twice := nbd.Contexts{{Name: "a:b", ID: 1}, {Name: "a:b", ID: 2}}
	for name, tt := range map[string]struct {
		change func(*nbd.Document)
		o      nbd.Options
		says   string
	}{
		"no version": {func(d *nbd.Document) { d.Version = 0 }, reconnect, "has version 0, and not 1"},
		"a later version": {func(d *nbd.Document) { d.Version++ }, reconnect,
			"the document of the process before has version 2, and not 1"},
		"no connections":  {func(d *nbd.Document) { d.Connections = nil }, reconnect, "0 connections are not possible"},
		"too many":        {func(d *nbd.Document) { *d = document(65) }, reconnect, "65 connections are not possible"},
		"files missing":   {func(d *nbd.Document) { d.Connections[0].Dead = false }, reconnect, "1 files for 2 conn"},
		"files left over": {func(d *nbd.Document) { d.Connections[1].Dead = true }, reconnect, "1 files for 0 conn"},
		"nobody replaces": {func(*nbd.Document) {}, nbd.Options{}, "1 of 2 connections did not come along"},
		"no socket":       {func(*nbd.Document) {}, reconnect, "a connection from another process"},
		"a size":          {func(d *nbd.Document) { d.Agreement.Size = -1 }, reconnect, "an export of -1 bytes"},
		"a name":          {func(d *nbd.Document) { d.Agreement.Name = "a\x00b" }, reconnect, "export name"},
		"flags":           {func(d *nbd.Document) { d.Agreement.Flags = 0 }, reconnect, "the flags 0x0"},
		"one connection": {func(d *nbd.Document) { d.Agreement.Flags = wire.FlagHasFlags }, reconnect,
			"for one connection, and not for 2"},
		"block sizes": {func(d *nbd.Document) { d.Agreement.BlockSizes = wire.BlockSizes{Minimum: 3} }, reconnect,
			"the block sizes 3, 0, 0"},
		"TLS": {func(d *nbd.Document) { d.Agreement.TLS = true }, reconnect, "connections with TLS"},
		"extended": {func(d *nbd.Document) { d.Agreement.Extended = true }, reconnect,
			"not possible without structured replies"},
		"contexts without structure": {func(d *nbd.Document) { d.Agreement.Contexts = twice[:1] }, reconnect,
			"not possible without structured replies"},
		"contexts twice": {func(d *nbd.Document) {
			d.Agreement.Structured, d.Agreement.Contexts = true, twice
		}, reconnect, `the context "a:b", number 2, is not possible`},
		"a number twice": {func(d *nbd.Document) {
			d.Agreement.Structured = true
			d.Agreement.Contexts = nbd.Contexts{{Name: "a:b"}, {Name: "c:d"}}
		}, reconnect, `the context "c:d", number 0`},
		"a context's name": {func(d *nbd.Document) {
			d.Agreement.Structured, d.Agreement.Contexts = true, nbd.Contexts{{Name: "\xff"}}
		}, reconnect, "the context"},
		"too many contexts": {func(d *nbd.Document) {
			d.Agreement.Structured = true
			for i := range 65 {
				x := nbd.Context{Name: strings.Repeat("x", i+1), ID: uint32(i)}
				d.Agreement.Contexts = append(d.Agreement.Contexts, x)
			}
		}, reconnect, "65 contexts are not possible"},
		"other contexts": {func(d *nbd.Document) {
			d.Agreement.Structured, d.Agreement.Contexts = true, twice[:1]
			d.Connections[1].Contexts = nbd.Contexts{{Name: "c:d"}}
		}, reconnect, `connection 1 has the contexts ["c:d"], and not ["a:b"]`},
		"contexts of a connection twice": {func(d *nbd.Document) { d.Connections[1].Contexts = twice }, reconnect,
			"or there twice"},
		"options": {func(*nbd.Document) {}, nbd.Options{Timeout: -1}, "a timeout of -1ns"},
	} {
		t.Run(name, func(t *testing.T) {
			d := document(2)
			d.Connections[1].Dead = false
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			tt.change(&d)
			c, err := nowhere.Inherit(d, []*os.File{f}, tt.o)
			if c != nil || err == nil {
				t.Fatalf("%v, %v; want %q", c, err, tt.says)
			}
			if says := err.Error(); !strings.HasPrefix(says, "nbd: ") || !strings.Contains(says, tt.says) {
				t.Errorf("it says %q; want %q", says, tt.says)
			}
			if err := f.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the file is open: %v", err)
			}
		})
	}
}

// The documents that are committed, as version 1 writes them.
var (
	ofTwo = nbd.Document{
		Version: 1,
		Agreement: nbd.Agreement{
			Info: nbd.Info{
				Name: "disk", Description: "a disk", Size: 1 << 40, Flags: 0x5ed,
				BlockSizes: wire.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 32 << 20},
			},
			Structured: true, Extended: true,
			Contexts: nbd.Contexts{{Name: "base:allocation", ID: 7}, {Name: dirty, ID: 4294967280}},
		},
		Connections: []nbd.HandedConnection{
			{Contexts: nbd.Contexts{{Name: "base:allocation", ID: 9}, {Name: dirty, ID: 4294967280}}}, {Dead: true},
		},
	}
	ofNone = nbd.Document{
		Version:     1,
		Agreement:   nbd.Agreement{Info: nbd.Info{Name: "disk", Size: 1 << 40, Flags: 0x5ed}, TLS: true},
		Connections: []nbd.HandedConnection{{Dead: true}, {Dead: true}},
		Since:       time.Date(2026, 11, 30, 14, 0, 0, 500, time.UTC),
	}
)

// committed reads one of them.
func committed(t *testing.T, name string) (d nbd.Document, text []byte) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "handover", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return d, text
}

// TestDocument holds that this version reads what version 1 has written, and writes the same.
func TestDocument(t *testing.T) {
	for name, want := range map[string]nbd.Document{"v1.json": ofTwo, "v1_lost.json": ofNone} {
		got, text := committed(t, name)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(nbd.Info{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		again, err := json.MarshalIndent(got, "", "  ")
		if err != nil || !bytes.Equal(append(again, '\n'), text) {
			t.Errorf("%s: %v, this version writes\n%s", name, err, again)
		}
	}
	d, _ := committed(t, "v1_lost.json")
	c := inherit(t, d, nbd.Options{Reconnect: quick()})
	if s := c.State(); c.Size() != 1<<40 || c.Connections() != 2 || !s.Since.Equal(d.Since) {
		t.Errorf("%d bytes, %d connections, %+v", c.Size(), c.Connections(), s)
	}
}
