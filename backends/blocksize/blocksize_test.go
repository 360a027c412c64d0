package blocksize_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/blocksize"
)

func layer(t testing.TB, d *disk, block int) *blocksize.Backend {
	t.Helper()
	b, err := blocksize.New(d, block)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.wrong != nil {
			t.Errorf("the inner backend was asked for a %v", d.wrong)
		}
	})
	return b
}

func TestConformance(t *testing.T) {
	const simple = backends.CapWrite | backends.CapSync
	for _, tt := range []struct {
		block int
		sizes backends.BlockSizes
		size  int
		caps  backends.Caps
	}{
		{512, backends.BlockSizes{Minimum: 32 << 10, Preferred: 32 << 10}, 2 << 20, all},
		{1, backends.BlockSizes{Minimum: 4096, Maximum: 8192}, 2<<20 + 4096, all},
		{1, backends.BlockSizes{Minimum: 64 << 10, Preferred: 128 << 10, Maximum: 64 << 10}, 2 << 20, simple},
		{512, backends.BlockSizes{Minimum: 1 << 20}, 6 << 20, all &^ backends.CapFUA},
		{4096, backends.BlockSizes{Minimum: 512}, 2 << 20, all &^ backends.CapContexts},
		{4096, backends.BlockSizes{}, 2 << 20, all &^ backends.CapContexts},
		{512, backends.BlockSizes{Minimum: 32 << 10}, 2 << 20, all &^ backends.CapWrite},
	} {
		t.Run(fmt.Sprint(tt.block, "on", tt.sizes, tt.caps), func(t *testing.T) {
			var d *disk
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				d = newDisk(tt.size, tt.sizes, tt.caps)
				return layer(t, d, tt.block)
			}, backendtest.Options{
				Operations: 100,
				Reopen: func(t testing.TB, _ backends.Backend) backends.Backend {
					if tt.caps&backends.CapSync != 0 {
						copy(d.data, d.stable)
					}
					return layer(t, d, tt.block)
				},
				Stall: func(testing.TB, backends.Backend) (release func()) {
					d.mu.Lock()
					defer d.mu.Unlock()
					stall := make(chan struct{})
					d.stall = stall
					return func() {
						d.mu.Lock()
						defer d.mu.Unlock()
						d.stall = nil
						close(stall)
					}
				},
			})
		})
	}
}

// TestRequests holds what the inner backend is asked for: as few requests as can be, and no block
// that is not concerned.
func TestRequests(t *testing.T) {
	const k = 1 << 10
	d := newDisk(4<<20, backends.BlockSizes{Minimum: 32 * k}, all)
	b := layer(t, d, 512)
	d.note = true
	write := func(off, n int) func() error {
		return func() error { _, err := b.WriteAt(make([]byte, n), int64(off)); return err }
	}
	read := func(off, n int) func() error {
		return func() error { _, err := b.ReadAt(make([]byte, n), int64(off)); return err }
	}
	for _, tt := range []struct {
		do   func() error
		want string
	}{
		{read(0, 64*k), "read 0+65536"},
		{read(512, 512), "read 0+32768"},
		{read(32*k-512, 1024), "read 0+65536"},
		{read(512, 64*k), "read 0+98304"},
		{read(32*k, 512*k), "read 32768+524288"},
		{read(31*k, 512*k), "read 0+262144, read 262144+262144, read 524288+32768"},
		{read(32*k, 511*k), "read 32768+491520, read 524288+32768"},
		{write(0, 64*k), "write 0+65536"},
		{write(512, 512), "read 0+32768, write 0+32768"},
		{write(0, 512), "read 0+32768, write 0+32768"},
		{write(32*k-512, 512), "read 0+32768, write 0+32768"},
		{write(32*k-512, 1024), "read 0+32768, read 32768+32768, write 0+65536"},
		{write(32*k-512, 32*k+512), "read 0+32768, write 0+65536"},
		{write(32*k, 33*k), "read 65536+32768, write 32768+65536"},
		{write(0, 0), ""},
		{func() error { _, err := b.WriteAtFUA(make([]byte, 512), 512); return err }, "read 0+32768, fua 0+32768"},
		{func() error { return b.Trim(0, 64*k) }, "trim 0+65536"},
		{func() error { return b.Trim(512, 32*k) }, ""},
		{func() error { return b.Trim(512, 64*k) }, "trim 32768+32768"},
		{func() error { return b.Zero(0, 64*k, 0) }, "zero 0+65536"},
		{func() error { return b.Zero(512, 1024, 0) }, "read 0+32768, write 0+32768"},
		{func() error { return b.Zero(512, 64*k, 0) },
			"zero 32768+32768, read 0+32768, write 0+32768, read 65536+32768, write 65536+32768"},
		{func() error { return b.Zero(32*k, 33*k, 0) }, "zero 32768+32768, read 65536+32768, write 65536+32768"},
		{func() error { return b.Zero(31*k, 2*k, 0) },
			"read 0+32768, write 0+32768, read 32768+32768, write 32768+32768"},
		{func() error { return b.Cache(512, 512) }, "cache 0+32768"},
	} {
		d.calls = nil
		if err := tt.do(); err != nil {
			t.Errorf("%s: %v", tt.want, err)
		}
		if got := strings.Join(d.calls, ", "); got != tt.want {
			t.Errorf("it was asked for %q, want %q", got, tt.want)
		}
	}
}

// TestZeroFast holds that zeros which are not fast are refused before anything has changed.
func TestZeroFast(t *testing.T) {
	d := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
	d.note = true
	b := layer(t, d, 512)
	for _, r := range [][2]int64{{512, 512}, {0, 512}, {512, 64 << 10}, {0, 64 << 10}} {
		if err := b.Zero(r[0], r[1], backends.ZeroFast); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("zeros at %v: %v", r, err)
		}
	}
	if len(d.calls) != 0 {
		t.Errorf("it was asked for %q", d.calls)
	}
}

// TestFailures holds that an error of each request ends the whole, and what it says.
func TestFailures(t *testing.T) {
	boom := errors.New("boom")
	for _, fail := range []string{"read 0", "read 32768", "write 0"} {
		d := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
		d.before = func(op string, off, n int64) error {
			if fmt.Sprint(op, " ", off) == fail {
				return boom
			}
			return nil
		}
		b := layer(t, d, 512)
		if n, err := b.WriteAt(bytes.Repeat([]byte{1}, 1024), 32<<10-512); n != 0 || !errors.Is(err, boom) {
			t.Errorf("%s fails: %d bytes, %v", fail, n, err)
		}
		if len(bytes.Trim(d.data, "\x00")) != 0 {
			t.Errorf("%s fails: something has changed", fail)
		}
		d.before = nil
		if n, err := b.WriteAt(bytes.Repeat([]byte{1}, 1024), 32<<10-512); n != 1024 || err != nil {
			t.Errorf("after %s: %d bytes, %v", fail, n, err)
		}
	}
	short := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all&^backends.CapReadContext)
	b := layer(t, short, 512)
	short.before = func(string, int64, int64) error { return io.EOF }
	if n, err := b.ReadAt(make([]byte, 512), 0); n != 0 || err != io.ErrUnexpectedEOF {
		t.Errorf("an inner backend that ends early: %d bytes, %v", n, err)
	}
}

// TestRange holds the size of a layer and what is at its end.
func TestRange(t *testing.T) {
	d := newDisk(100_000, backends.BlockSizes{Minimum: 32 << 10}, all)
	b := layer(t, d, 512)
	if b.Size() != 98_304 {
		t.Errorf("it has %d bytes", b.Size())
	}
	p := make([]byte, 1024)
	for off, want := range map[int64]int{98_304 - 1024: 1024, 98_304 - 512: 512, 98_304: 0, 1 << 40: 0} {
		n, err := b.ReadAt(p, off)
		if n != want || n < len(p) && err != io.EOF {
			t.Errorf("at %d: %d bytes, %v", off, n, err)
		}
	}
	for _, block := range []int{0, -1, 3, 1000} {
		if _, err := blocksize.New(d, block); err == nil {
			t.Errorf("blocks of %d bytes were taken", block)
		}
	}
}

// TestExtents holds that pieces are cut to what was asked for.
func TestExtents(t *testing.T) {
	d := newDisk(256<<10, backends.BlockSizes{Minimum: 32 << 10}, all)
	d.data[40<<10] = 1
	b := layer(t, d, 512)
	var got []string
	err := b.Extents(39<<10, 6<<10, func(e backends.Extent) bool {
		got = append(got, fmt.Sprint(e.Offset, "+", e.Length, ",", e.Zero))
		return true
	})
	want := []string{"39936+1024,true", "40960+4096,false", "45056+1024,true"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q: %v, want %q", got, err, want)
	}
	got = nil
	err = b.ContextExtents("x-test:blocks", 33<<10, 512, func(m backends.Mark) bool {
		got = append(got, fmt.Sprint(m))
		return true
	})
	if want = []string{"{33792 512 1}"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q: %v, want %q", got, err, want)
	}
}

// TestOrder holds who waits for whom: each change of a part of a block for all that change the
// block, and they for it; nobody else.
func TestOrder(t *testing.T) {
	const unit = 32 << 10
	type change func(b *blocksize.Backend) error
	write := func(off, n int) change {
		return func(b *blocksize.Backend) error { _, err := b.WriteAt(make([]byte, n), int64(off)); return err }
	}
	for name, tt := range map[string]struct {
		first, second change
		waits         bool
	}{
		"same block":         {write(0, 512), write(1024, 512), true},
		"last block of one":  {write(unit-512, 1024), write(unit+1024, 512), true},
		"neighbours":         {write(0, 512), write(unit, 512), false},
		"whole behind part":  {write(0, 512), write(0, unit), true},
		"part behind whole":  {write(0, unit), write(0, 512), true},
		"two wholes":         {write(0, unit), write(0, unit), false},
		"zeros behind part":  {write(0, 512), func(b *blocksize.Backend) error { return b.Zero(0, unit, 0) }, true},
		"zeros of a part":    {write(0, unit), func(b *blocksize.Backend) error { return b.Zero(512, 512, 0) }, true},
		"trim behind part":   {write(0, 512), func(b *blocksize.Backend) error { return b.Trim(0, unit) }, true},
		"trim beside a part": {write(0, 512), func(b *blocksize.Backend) error { return b.Trim(0, 512) }, false},
		"reads do not wait": {write(0, 512),
			func(b *blocksize.Backend) error { _, err := b.ReadAt(make([]byte, 512), 0); return err }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(1<<20, backends.BlockSizes{Minimum: unit}, all)
				b := layer(t, d, 512)
				hold := make(chan struct{})
				d.before = func(op string, _, _ int64) error {
					if op == "write" {
						<-hold
					}
					return nil
				}
				done := make(chan error, 2)
				go func() { done <- tt.first(b) }()
				synctest.Wait()
				d.mu.Lock()
				d.note = true
				d.mu.Unlock()
				var reads int
				before := d.before
				d.before = func(op string, off, n int64) error { reads++; return before(op, off, n) }
				go func() { done <- tt.second(b) }()
				synctest.Wait()
				trimmed := name == "trim beside a part" // asks for nothing
				if waits := reads == 0 && !trimmed; waits != tt.waits {
					t.Errorf("the second waits: %v, want %v", waits, tt.waits)
				}
				close(hold)
				for range 2 {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// TestTurns holds that claims which wait go on in order, and that one which was given up stands in
// nobody's way.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
		b := layer(t, d, 512)
		hold := make(chan struct{})
		d.before = func(op string, _, _ int64) error {
			if op == "write" {
				<-hold
			}
			return nil
		}
		gone := errors.New("gone")
		ctx, giveUp := context.WithCancelCause(t.Context())
		results := make([]chan error, 4)
		for i := range results {
			results[i] = make(chan error, 1)
			c := t.Context()
			if i == 1 {
				c = ctx
			}
			go func() {
				_, err := b.WriteAtContext(c, bytes.Repeat([]byte{byte(i + 1)}, 512), int64(i%2*512))
				results[i] <- err
			}()
			synctest.Wait()
		}
		giveUp(gone)
		if err := <-results[1]; err != gone {
			t.Errorf("the one that was given up: %v", err)
		}
		for _, i := range []int{0, 2, 3} {
			select {
			case err := <-results[i]:
				t.Fatalf("number %d did not wait: %v", i, err)
			default:
			}
			hold <- struct{}{}
			if err := <-results[i]; err != nil {
				t.Errorf("number %d: %v", i, err)
			}
			synctest.Wait()
		}
		if d.data[0] != 3 || d.data[512] != 4 {
			t.Errorf("the block has %d and %d", d.data[0], d.data[512])
		}
	})
}

// TestBounces holds that memory is bounded: requests beyond wait, and can be given up.
func TestBounces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 32
		d := newDisk(4<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
		b := layer(t, d, 512)
		hold := make(chan struct{})
		d.before = func(string, int64, int64) error { <-hold; return nil }
		done := make(chan error, 2*most)
		for i := range most {
			go func() { _, err := b.ReadAt(make([]byte, 512), int64(i)<<15); done <- err }()
		}
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		if _, err := b.ReadAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("one more read: %v", err)
		}
		if _, err := b.WriteAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("one more write: %v", err)
		}
		close(hold)
		for range most {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}
