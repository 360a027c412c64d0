package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestRequests holds what requests are on the wire, byte by byte.
func TestRequests(t *testing.T) {
	const off, n = 0x123456789a, 0x1234
	data := pattern(off, n)
	tests := []struct {
		name           string
		f              func(c *nbd.Client) error
		flags, command u16
		off, n         int64
		data           []byte
	}{
		{"ReadAt", func(c *nbd.Client) error { _, err := c.ReadAt(make([]byte, n), off); return err },
			0, 0, off, n, nil},
		{"ReadAt, a byte", func(c *nbd.Client) error { _, err := c.ReadAt(make([]byte, 1), 0); return err },
			0, 0, 0, 1, nil},
		{"WriteAt", func(c *nbd.Client) error { _, err := c.WriteAt(data, off); return err }, 0, 1, off, n, data},
		{"WriteAt, large", func(c *nbd.Client) error { _, err := c.WriteAt(pattern(1, 100<<10), 1); return err },
			0, 1, 1, 100 << 10, pattern(1, 100<<10)},
		{"WriteAtFUA", func(c *nbd.Client) error { _, err := c.WriteAtFUA(data, off); return err }, 1, 1, off, n, data},
		{"Sync", func(c *nbd.Client) error { return c.Sync() }, 0, 3, 0, 0, nil},
		{"Trim", func(c *nbd.Client) error { return c.Trim(off, n) }, 0, 4, off, n, nil},
		{"Cache", func(c *nbd.Client) error { return c.Cache(off, n) }, 0, 5, off, n, nil},
		{"Zero", func(c *nbd.Client) error { return c.Zero(off, n, 0) }, 0, 6, off, n, nil},
		{"Zero, no hole", func(c *nbd.Client) error { return c.Zero(off, n, backends.ZeroNoHole) }, 2, 6, off, n, nil},
		{"Zero, fast", func(c *nbd.Client) error { return c.Zero(off, n, backends.ZeroFast) }, 0x10, 6, off, n, nil},
		{"Zero, both", func(c *nbd.Client) error { return c.Zero(off, n, backends.ZeroFast|backends.ZeroNoHole) },
			0x12, 6, off, n, nil},
		{"Extents", func(c *nbd.Client) error {
			return c.Extents(off, n, func(backends.Extent) bool { return true })
		}, 0, 7, off, n, nil},
		{"ContextExtents", func(c *nbd.Client) error {
			return c.ContextExtents(dirty, off, n, func(backends.Mark) bool { return true })
		}, 0, 7, off, n, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			each(t, forms, func(t *testing.T, r *rig) {
				if tt.command == cmdStatus && r.form == simple {
					checkIs(t, tt.f(r.c), errors.ErrUnsupported)
					return
				}
				is := r.effect(func() error { return tt.f(r.c) })
				// The cookie is the client's affair.
				head := request(r.form, r.flags(tt.command, tt.flags), tt.command, 0, tt.off, tt.n)
				got := make([]byte, len(head)+len(tt.data))
				if _, err := io.ReadFull(r.nc, got); err != nil {
					t.Fatal(err)
				}
				cookie := bytes.Clone(got[8:16])
				clear(got[8:16])
				if diff := firstDifference(got, cat(head, tt.data)); diff != "" {
					t.Errorf("%s of\n%x", diff, got[:len(head)])
				}
				q := query{command: tt.command, offset: tt.off, length: tt.n}
				for _, b := range cookie {
					q.cookie = q.cookie<<8 | u64(b)
				}
				switch tt.command {
				case cmdRead:
					r.say(r.filled(q, make([]byte, tt.n)))
				case cmdStatus:
					r.say(r.status(q, 0, dirtyID, u64(tt.n), 0), r.status(q, done, allocationID, u64(tt.n), 0))
				default:
					r.say(r.ok(q))
				}
				if err := (<-is).err; err != nil {
					t.Error(err)
				}
				r.works()
			})
		})
	}
}

// TestCookies holds that those of requests in flight differ, as do those of requests that come
// after one another.
func TestCookies(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		seen := make(map[u64]bool)
		for range 20 {
			var all []<-chan result
			var asked []query
			for range 10 {
				all = append(all, r.effect(r.c.Sync))
				asked = append(asked, r.next())
			}
			for i, is := range all {
				q := asked[i]
				if seen[q.cookie] || q.cookie == 0 {
					t.Errorf("cookie %#x", q.cookie)
				}
				seen[q.cookie] = true
				r.say(r.ok(q))
				if err := (<-is).err; err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// A piece is a request for a part of what a caller wants.
type piece struct{ off, n int64 }

// expect serves requests for pieces, each of which must be of a command and flags, and have the
// right data.
func (r *rig) expect(command, flags u16, errno u32, pieces ...piece) {
	r.t.Helper()
	for i, p := range pieces {
		q := r.next()
		if q.command != command || q.flags != r.flags(command, flags) || q.offset != p.off || q.length != p.n {
			r.t.Fatalf("request %d is of command %d, flags %#x, %d bytes at %d; want %+v", i, q.command, q.flags,
				q.length, q.offset, p)
		}
		if want := pattern(q.offset, len(q.data)); !bytes.Equal(q.data, want) {
			r.t.Errorf("request %d: %s", i, firstDifference(q.data, want))
		}
		switch {
		case errno != 0:
			r.say(r.failed(q, errno, ""))
		case command == cmdRead:
			r.say(r.filled(q, pattern(q.offset, int(q.length))))
		default:
			r.say(r.ok(q))
		}
	}
}

// blocks has a server state block sizes.
func blocks(least, most uint32) func(*nbd.Agreement) {
	return func(a *nbd.Agreement) {
		a.BlockSizes = wire.BlockSizes{Minimum: least, Preferred: max(least, 512), Maximum: most}
	}
}

// TestSplit holds that what is longer than the server takes is asked for in pieces, and that an
// error of one of them tells how far it went.
func TestSplit(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*nbd.Agreement)
		off, n int64
		pieces []piece
	}{
		{"none", blocks(1, 4096), 1, 4096, []piece{{1, 4096}}},
		{"one byte more", blocks(1, 4096), 1, 4097, []piece{{1, 4096}, {4097, 1}}},
		{"three", blocks(512, 1536), 512, 4096, []piece{{512, 1536}, {2048, 1536}, {3584, 1024}}},
		{"a byte each", blocks(1, 1), 7, 3, []piece{{7, 1}, {8, 1}, {9, 1}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			each(t, forms, func(t *testing.T, r *rig) {
				p := make([]byte, tt.n)
				is := r.read(p, tt.off)
				r.expect(cmdRead, 0, 0, tt.pieces...)
				if got := <-is; got.err != nil || int64(got.n) != tt.n {
					t.Errorf("read %d bytes: %v", got.n, got.err)
				}
				if diff := firstDifference(p, pattern(tt.off, int(tt.n))); diff != "" {
					t.Error(diff)
				}
				is = r.write(p, tt.off)
				r.expect(cmdWrite, 0, 0, tt.pieces...)
				if got := <-is; got.err != nil || int64(got.n) != tt.n {
					t.Errorf("wrote %d bytes: %v", got.n, got.err)
				}
				is = r.call(func() (int, error) { return r.c.WriteAtFUA(p, tt.off) })
				r.expect(cmdWrite, 1, 0, tt.pieces...)
				if got := <-is; got.err != nil || int64(got.n) != tt.n {
					t.Errorf("wrote %d bytes: %v", got.n, got.err)
				}
				last := len(tt.pieces) - 1
				for _, command := range []u16{cmdRead, cmdWrite} {
					call := r.read
					if command == cmdWrite {
						call = r.write
					}
					is := call(p, tt.off)
					r.expect(command, 0, 0, tt.pieces[:last]...)
					r.expect(command, 0, 28, tt.pieces[last])
					got := <-is
					if checkIs(t, got.err, syscall.ENOSPC); int64(got.n) != tt.pieces[last].off-tt.off {
						t.Errorf("command %d: it went %d bytes far, want %d", command, got.n,
							tt.pieces[last].off-tt.off)
					}
				}
			}, tt.change)
		})
	}
}

// TestSplitUnstated holds that no request for data is above 32 MiB, whatever the server takes.
func TestSplitUnstated(t *testing.T) {
	p := make([]byte, 32<<20+1)
	for _, change := range []func(*nbd.Agreement){func(*nbd.Agreement) {}, blocks(1, 0xffffffff), blocks(1, 32<<20+1)} {
		bubble(t, structured, func(t *testing.T, r *rig) {
			is := r.read(p, 5)
			for _, want := range []piece{{5, 32 << 20}, {5 + 32<<20, 1}} {
				q := r.next()
				if (piece{q.offset, q.length}) != want {
					t.Fatalf("%d bytes at %d, want %+v", q.length, q.offset, want)
				}
				r.say(r.chunk(q, done, chunkHole, u64(q.offset), u32(q.length)))
			}
			if got := <-is; got.n != len(p) || got.err != nil {
				t.Errorf("%d bytes: %v", got.n, got.err)
			}
			is = r.write(p, 5)
			if q, err := r.head(); err != nil || q.length != 32<<20 {
				t.Errorf("%d bytes at %d, %v", q.length, q.offset, err)
			}
			r.nc.Close()
			if err := (<-is).err; err == nil {
				t.Error("it is written")
			}
		}, change)
	}
}

// TestNeverSent holds that a range that the export does not have is never asked for, nor what is no
// multiple of its blocks.
func TestNeverSent(t *testing.T) {
	const most = math.MaxInt64
	for _, tt := range []struct {
		off, n int64
		want   error // of a READ, and of a WRITE
		write  error
	}{
		{-1, 512, syscall.EINVAL, syscall.EINVAL},
		{math.MinInt64, 512, syscall.EINVAL, syscall.EINVAL},
		{rigSize, 512, io.EOF, syscall.ENOSPC},
		{rigSize + 1, 512, io.EOF, syscall.ENOSPC},
		{most, 512, io.EOF, syscall.ENOSPC},
		{most - 511, 512, io.EOF, syscall.ENOSPC},
		{rigSize - 511, 512, syscall.EINVAL, syscall.ENOSPC},
		{1, 512, syscall.EINVAL, syscall.EINVAL},
		{512, 511, syscall.EINVAL, syscall.EINVAL},
		{256, 256, syscall.EINVAL, syscall.EINVAL},
	} {
		t.Run(fmt.Sprint(tt.off, " ", tt.n), func(t *testing.T) {
			each(t, forms, func(t *testing.T, r *rig) {
				p := make([]byte, tt.n)
				check := func(n int, err, want error) {
					t.Helper()
					if n != 0 || !errors.Is(err, want) {
						t.Errorf("%d bytes, %v, want %v", n, err, want)
					}
				}
				n, err := r.c.ReadAt(p, tt.off)
				check(n, err, tt.want)
				n, err = r.c.ReadAtContext(t.Context(), p, tt.off)
				check(n, err, tt.want)
				n, err = r.c.WriteAt(p, tt.off)
				check(n, err, tt.write)
				n, err = r.c.WriteAtFUA(p, tt.off)
				check(n, err, tt.write)
				for _, e := range effects {
					check(0, e.f(r.c, tt.off, tt.n), syscall.EINVAL)
					check(0, e.f(r.c, 0, -512), syscall.EINVAL)
					check(0, e.f(r.c, 512, rigSize), syscall.EINVAL)
					check(0, e.f(r.c, most-511, most-511), syscall.EINVAL)
				}
				r.works()
			}, blocks(512, 1<<20))
		})
	}
}

// TestEndOfExport holds that a read that goes past the end has what there is, and io.EOF.
func TestEndOfExport(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		p := make([]byte, 1000)
		is := r.read(p, rigSize-300)
		r.expect(cmdRead, 0, 0, piece{rigSize - 300, 300})
		if got := <-is; got.n != 300 || got.err != io.EOF || !bytes.Equal(p[:300], pattern(rigSize-300, 300)) {
			t.Errorf("%d bytes: %v", got.n, got.err)
		}
		is = r.read(p, rigSize-300)
		r.expect(cmdRead, 0, 5, piece{rigSize - 300, 300})
		if got := <-is; got.n != 0 || errors.Is(got.err, io.EOF) {
			t.Errorf("%d bytes: %v", got.n, got.err)
		}
		for _, off := range []int64{0, 5, rigSize} { // Nothing is there everywhere.
			if n, err := r.c.ReadAt(nil, off); n != 0 || err != nil && (err != io.EOF || off < rigSize) {
				t.Errorf("nothing at %d: %d, %v", off, n, err)
			}
			if n, err := r.c.WriteAt(nil, off); n != 0 || err != nil {
				t.Errorf("nothing at %d: %d, %v", off, n, err)
			}
		}
		r.works()
	})
}

// TestRequestsTogether holds that callers who come while another sends have their requests sent in
// one piece.
func TestRequestsTogether(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		const n = 20
		var all []<-chan result
		for i := range n {
			off, length := int64(i)<<20, 100+i*1000 // The longer ones are not copied.
			all = append(all, r.write(pattern(off, length), off))
		}
		synctest.Wait() // The first one waits for the server to read, the others for the first one.
		seen := make(map[int64]bool)
		for range n {
			q := r.next()
			if i := q.offset >> 20; seen[q.offset] || !bytes.Equal(q.data, pattern(q.offset, 100+int(i)*1000)) {
				t.Errorf("%d bytes at %d: %s", q.length, q.offset,
					firstDifference(q.data, pattern(q.offset, int(q.length))))
			}
			seen[q.offset] = true
			r.say(r.ok(q))
		}
		for _, is := range all {
			if got := <-is; got.err != nil {
				t.Error(got.err)
			}
		}
		r.works()
	})
}
