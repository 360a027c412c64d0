package server_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A farDisk is a disk that knows Cache, and zeroes that are not quick.
type farDisk struct{ *disk }

func (d farDisk) Cache(off, n int64) error { return d.call("cache", off, n, func() {}) }

func (d farDisk) Zero(off, n int64, flags backends.ZeroFlags) error {
	if flags&backends.ZeroFast != 0 {
		return d.call("zero-fast", off, n, func() {})
	}
	return d.disk.Zero(off, n, flags)
}

// TestCache has ranges fetched that a client is going to read ("NBD_CMD_CACHE"), and one that can't
// be.
func TestCache(t *testing.T) {
	const cmdCache = 5
	d := farDisk{newDisk(1 << 20)}
	e := export(t, d, server.Options{})
	c := connect(t, e)
	for _, tt := range []struct {
		q    call
		want uint32
	}{
		{call{op: cmdCache, offset: 4096, length: 8192}, 0},
		{call{op: cmdCache, length: 1 << 20}, 0},
		{call{op: cmdCache, offset: 1 << 20, length: 1}, einval},
		{call{op: cmdCache, length: 1, flags: noHole}, einval},
		{call{op: cmdCache, length: 0}, 0},
	} {
		c.expect(tt.want, tt.q)
	}
	if diff := cmp.Diff([]string{"cache 4096+8192", "cache 0+1048576"}, d.history()); diff != "" {
		t.Errorf("the backend was asked (-want +got):\n%s", diff)
	}
	d.before = func(string, int64, int64) error { return errors.New("the lens is dirty") }
	c.expect(eio, call{op: cmdCache, length: 1})
	if loss := e.Loss(); loss != nil {
		t.Errorf("a fetch that failed is a loss: %v", loss)
	}
}

// TestFastZero has zeroes made only where that is quicker than to write them
// ("NBD_CMD_FLAG_FAST_ZERO").
func TestFastZero(t *testing.T) {
	const fastZero = 1 << 4
	d := farDisk{newDisk(1 << 20)}
	copy(d.data, bytes.Repeat([]byte{1}, 1<<20))
	e := export(t, d, server.Options{})
	c := connect(t, e)
	c.expect(0, call{op: cmdZero, flags: fastZero, length: 4096})
	d.before = func(op string, _, _ int64) error {
		if op == "zero-fast" {
			return errors.ErrUnsupported
		}
		return nil
	}
	c.expect(95, call{op: cmdZero, flags: fastZero | noHole, offset: 8192, length: 4096})
	if diff := cmp.Diff([]string{"zero-fast 0+4096", "zero-fast 8192+4096"}, d.history()); diff != "" {
		t.Errorf("the backend was asked (-want +got):\n%s", diff)
	}
	if slices.Contains(d.data[8192:12288], 0) {
		t.Error("zeroes were written all the same")
	}
	if e.LastError() != nil || e.Loss() != nil {
		t.Errorf("an answer that was asked for is an error: %v, %v", e.LastError(), e.Loss())
	}
}
