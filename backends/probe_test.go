package backends_test

import (
	"bytes"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
)

// full has every method there is. Its parts, behind interfaces, make backends
// with fewer.
type full struct{}

func (full) ReadAt(p []byte, off int64) (int, error)                      { return len(p), nil }
func (full) Size() int64                                                  { return 4096 }
func (full) WriteAt(p []byte, off int64) (int, error)                     { return len(p), nil }
func (full) Sync() error                                                  { return nil }
func (full) WriteAtFUA(p []byte, off int64) (int, error)                  { return len(p), nil }
func (full) Trim(off, n int64) error                                      { return nil }
func (full) Zero(off, n int64, flags backends.ZeroFlags) error            { return nil }
func (full) Extents(off, n int64, yield func(backends.Extent) bool) error { return nil }
func (full) Cache(off, n int64) error                                     { return nil }
func (full) Resize(size int64) error                                      { return nil }
func (full) ReadAtTo(w backends.Reply, off int64, n int) error            { return nil }
func (full) WriteAtFrom(r backends.Payload, off int64, n int) error       { return nil }
func (full) BlockSizes() backends.BlockSizes                              { return backends.BlockSizes{Minimum: 512} }

type (
	backend = backends.Backend
	write   = io.WriterAt
)

const (
	all      = backends.CapWriteFrom<<1 - 1 | backends.CapCache
	readOnly = backends.CapExtents | backends.CapReadTo | backends.CapCache
)

func TestProbeMethods(t *testing.T) {
	type (
		sync      = backends.Syncer
		fua       = backends.FUAWriter
		trim      = backends.Trimmer
		zero      = backends.Zeroer
		extents   = backends.Extenter
		resize    = backends.Resizer
		readTo    = backends.ReaderAtTo
		writeFrom = backends.WriterAtFrom
	)
	var f full
	for _, tt := range []struct {
		b    backends.Backend
		want backends.Caps
	}{
		{f, all},
		{struct{ backend }{f}, 0},
		{bytes.NewReader(nil), 0},
		{strings.NewReader(""), 0},
		{io.NewSectionReader(f, 0, 4096), 0},

		// Each method beside WriteAt.
		{struct {
			backend
			write
		}{f, f}, backends.CapWrite},
		{struct {
			backend
			write
			sync
		}{f, f, f}, backends.CapWrite | backends.CapSync},
		{struct {
			backend
			write
			fua
		}{f, f, f}, backends.CapWrite | backends.CapFUA},
		{struct {
			backend
			write
			trim
		}{f, f, f}, backends.CapWrite | backends.CapTrim},
		{struct {
			backend
			write
			zero
		}{f, f, f}, backends.CapWrite | backends.CapZero},
		{struct {
			backend
			write
			extents
		}{f, f, f}, backends.CapWrite | backends.CapExtents},
		{struct {
			backend
			write
			resize
		}{f, f, f}, backends.CapWrite | backends.CapResize},
		{struct {
			backend
			write
			readTo
		}{f, f, f}, backends.CapWrite | backends.CapReadTo},
		{struct {
			backend
			write
			writeFrom
		}{f, f, f}, backends.CapWrite | backends.CapWriteFrom},

		// Each method without it: only what does not change content is left.
		{struct {
			backend
			sync
		}{f, f}, 0},
		{struct {
			backend
			fua
		}{f, f}, 0},
		{struct {
			backend
			trim
		}{f, f}, 0},
		{struct {
			backend
			zero
		}{f, f}, 0},
		{struct {
			backend
			extents
		}{f, f}, backends.CapExtents},
		{struct {
			backend
			resize
		}{f, f}, 0},
		{struct {
			backend
			readTo
		}{f, f}, backends.CapReadTo},
		{struct {
			backend
			writeFrom
		}{f, f}, 0},
		{struct {
			backend
			sync
			fua
			trim
			zero
			extents
			resize
			readTo
			writeFrom
		}{f, f, f, f, f, f, f, f, f}, readOnly &^ backends.CapCache},
	} {
		d := backends.Probe(tt.b)
		if d.Caps != tt.want {
			t.Errorf("%T: %v, want %v", tt.b, d.Caps, tt.want)
		}
		checkFields(t, d)
	}
}

// checkFields compares the bits with the fields that are not nil.
func checkFields(t *testing.T, d backends.Device) {
	t.Helper()
	var fields backends.Caps
	for bit, field := range map[backends.Caps]any{
		backends.CapWrite: d.WriterAt, backends.CapSync: d.Syncer, backends.CapFUA: d.FUAWriter,
		backends.CapTrim: d.Trimmer, backends.CapZero: d.Zeroer, backends.CapExtents: d.Extenter,
		backends.CapResize: d.Resizer, backends.CapReadTo: d.ReadTo, backends.CapWriteFrom: d.WriteFrom,
		backends.CapCache: d.Cacher,
	} {
		if field != nil {
			fields |= bit
		}
	}
	if fields != d.Caps {
		t.Errorf("%T: Caps %v, but fields %v", d.Backend, d.Caps, fields)
	}
}

// capped is a wrapper that can do all and is allowed some.
type capped struct {
	full
	caps backends.Caps
}

func (c capped) Caps() backends.Caps { return c.caps }

func TestProbeCaps(t *testing.T) {
	for caps := range all + 1 {
		if caps&^all != 0 {
			continue
		}
		want := caps
		if caps&backends.CapWrite == 0 {
			want &= readOnly
		}
		d := backends.Probe(capped{caps: caps})
		if d.Caps != want {
			t.Errorf("allowed %v: %v, want %v", caps, d.Caps, want)
		}
		checkFields(t, d)
	}
}

// boaster claims everything and has ReadAt.
type boaster struct{ backends.Backend }

func (boaster) Caps() backends.Caps { return ^backends.Caps(0) }

func TestProbeCapsCannotAdd(t *testing.T) {
	d := backends.Probe(boaster{full{}})
	if d.Caps != 0 {
		t.Errorf("%v, want nothing", d.Caps)
	}
	checkFields(t, d)
}

func TestProbeBlockSizes(t *testing.T) {
	if got, want := backends.Probe(full{}).BlockSizes, (backends.BlockSizes{Minimum: 512}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := backends.Probe(bytes.NewReader(nil)).BlockSizes; !reflect.ValueOf(got).IsZero() {
		t.Errorf("%+v of a backend without an opinion", got)
	}
}

func TestProbeKeepsBackend(t *testing.T) {
	r := strings.NewReader("content")
	d := backends.Probe(r)
	p := make([]byte, 7)
	if _, err := d.ReadAt(p, 0); err != nil || string(p) != "content" || d.Size() != 7 {
		t.Errorf("%q, %v, size %d", p, err, d.Size())
	}
}

func TestCapsString(t *testing.T) {
	got := []string{backends.Caps(0).String(), all.String(), (backends.CapFUA | backends.CapReadTo).String()}
	want := []string{"", "write,sync,fua,trim,zero,extents,resize,readto,writefrom,cache", "fua,readto"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
