package server_test

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// sized is a backend of a given size and minimum block size.
type sized struct {
	io.ReaderAt
	size    int64
	minimum int
}

func (s sized) Size() int64                     { return s.size }
func (s sized) BlockSizes() backends.BlockSizes { return backends.BlockSizes{Minimum: s.minimum} }

func TestNewExport(t *testing.T) {
	tests := []struct {
		name    string
		b       backends.Backend
		o       server.Options
		block   int
		problem string // empty: none
	}{
		{name: "default", b: sized{size: 1000}, block: 1},
		{name: "empty", b: sized{}, block: 1},
		{name: "backend's minimum", b: sized{size: 8192, minimum: 4096}, block: 4096},
		{name: "above the backend's minimum", b: sized{size: 8192, minimum: 512}, o: server.Options{BlockSize: 4096},
			block: 4096},
		{name: "largest block", b: sized{size: 1 << 20}, o: server.Options{BlockSize: 65536}, block: 65536},
		{name: "no backend", problem: "no backend"},
		{name: "negative size", b: sized{size: -1}, problem: "negative size"},
		{name: "block size no power of two", b: sized{size: 3000}, o: server.Options{BlockSize: 1000},
			problem: "block size 1000"},
		{name: "block size negative", b: sized{size: 4096}, o: server.Options{BlockSize: -512},
			problem: "block size -512"},
		{name: "block size too large", b: sized{size: 1 << 20}, o: server.Options{BlockSize: 131072},
			problem: "block size 131072"},
		{name: "below the backend's minimum", b: sized{size: 8192, minimum: 4096}, o: server.Options{BlockSize: 512},
			problem: "below the 4096 bytes"},
		{name: "tail", b: sized{size: 1025}, o: server.Options{BlockSize: 512}, problem: "not a multiple"},
		{name: "nothing in flight", b: sized{}, o: server.Options{MaxInFlight: -1}, problem: "in flight"},
	}
	for _, tt := range tests {
		e, err := server.NewExport(tt.b, tt.o)
		if tt.problem != "" {
			if err == nil || !strings.Contains(err.Error(), tt.problem) {
				t.Errorf("%s: error %v, want one about %q", tt.name, err, tt.problem)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if e.BlockSize() != tt.block || e.Size() != tt.b.Size() {
			t.Errorf("%s: size %d, block size %d, want %d, %d", tt.name, e.Size(), e.BlockSize(), tt.b.Size(), tt.block)
		}
	}
}

func TestExportFlags(t *testing.T) {
	tests := []struct {
		name string
		b    backends.Backend
		o    server.Options
		want string
	}{
		{"a reader", bytes.NewReader(make([]byte, 512)), server.Options{}, "has-flags,read-only,multi-conn"},
		{"a writable disk, read-only", newDisk(512), server.Options{ReadOnly: true}, "has-flags,read-only,multi-conn"},
		{"a full disk", newDisk(512), server.Options{},
			"has-flags,flush,fua,trim,write-zeroes,multi-conn,fast-zero"},
		{"a far disk, read-only", farDisk{newDisk(512)}, server.Options{ReadOnly: true},
			"has-flags,read-only,multi-conn,cache"},
		{"write only", plain{newDisk(512), backends.CapWrite}, server.Options{},
			"has-flags,flush,fua,write-zeroes,multi-conn"},
		{"write and trim", plain{newDisk(512), backends.CapWrite | backends.CapTrim}, server.Options{},
			"has-flags,flush,fua,trim,write-zeroes,multi-conn"},
		{"no write, yet trim", plain{newDisk(512), backends.CapTrim}, server.Options{},
			"has-flags,read-only,multi-conn"},
	}
	for _, tt := range tests {
		if got := export(t, tt.b, tt.o).Flags().String(); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	if got := (wire.FlagReadOnly | 1<<15).String(); got != "read-only,0x8000" {
		t.Errorf("a flag without a name gives %q", got)
	}
}
