package nbd_test

import (
	"errors"
	"math"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

// An effect is a request without data.
type effect struct {
	name    string
	command u16
	flags   u16
	f       func(c *nbd.Client, off, n int64) error
}

var effects = []effect{
	{"trim", cmdTrim, 0, (*nbd.Client).Trim},
	{"cache", cmdCache, 0, (*nbd.Client).Cache},
	{"zero", cmdZeroes, 2, func(c *nbd.Client, off, n int64) error { return c.Zero(off, n, backends.ZeroNoHole) }},
}

// TestLongEffects holds that the longest ranges are one request with extended headers, and
// otherwise as few as 32 bits allow; and that a server to which that is too much gets pieces of the
// size that it takes.
func TestLongEffects(t *testing.T) {
	const most = 1<<32 - 4096
	long := []form{extended}
	short := []form{simple, structured}
	state := func(size int64, least, most uint32) func(*nbd.Agreement) {
		return func(a *nbd.Agreement) {
			blocks(least, most)(a)
			a.Size = size
		}
	}
	var many []piece
	for i := range int64(64) {
		many = append(many, piece{512 + i<<25, 1 << 25})
	}
	many = append(many, piece{512 + 1<<31, 512})
	for _, tt := range []struct {
		name    string
		forms   []form
		change  func(*nbd.Agreement)
		off, n  int64
		pieces  []piece
		refused int // so many requests are too long for the server
	}{
		{"nothing", forms, blocks(1, 4096), 5, 0, nil, 0},
		{"32 bits", forms, blocks(1, 4096), 512, most, []piece{{512, most}}, 0},
		{"a byte more", short, blocks(1, 4096), 512, most + 1, []piece{{512, most}, {512 + most, 1}}, 0},
		{"a byte more", long, blocks(1, 4096), 512, most + 1, []piece{{512, most + 1}}, 0},
		{"large blocks", short, blocks(65536, 65536), 0, 1 << 32, []piece{{0, 1<<32 - 65536}, {1<<32 - 65536, 65536}},
			0},
		{"all", short, state(3<<32, 1, 4096), 0, 3 << 32,
			[]piece{{0, most}, {most, most}, {2 * most, most}, {3 * most, 3 * 4096}}, 0},
		{"all", long, state(math.MaxInt64, 1, 4096), 0, math.MaxInt64, []piece{{0, math.MaxInt64}}, 0},
		{"refused", forms, blocks(512, 1<<31), 512, 1<<31 + 512, append([]piece{{512, 1<<31 + 512}}, many...), 1},
		{"refused", forms, blocks(1, 4096), 1, 10000, []piece{{1, 10000}, {1, 4096}, {4097, 4096}, {8193, 1808}}, 1},
		{"not too long, and refused", forms, blocks(1, 4096), 1, 4096, []piece{{1, 4096}}, 1},
		{"refused in the end", forms, blocks(1, 4096), 1, 4097, []piece{{1, 4097}, {1, 4096}}, 2},
		{"refused, 32 MiB", forms, func(*nbd.Agreement) {}, 0, 32<<20 + 1,
			[]piece{{0, 32<<20 + 1}, {0, 32 << 20}, {32 << 20, 1}}, 1},
	} {
		for _, e := range effects {
			t.Run(tt.name+", "+e.name, func(t *testing.T) {
				each(t, tt.forms, func(t *testing.T, r *rig) {
					for _, errno := range []u32{22, 75} {
						checkLong(t, r, e, tt.off, tt.n, tt.pieces, tt.refused, errno)
					}
				}, tt.change)
			})
		}
	}
}

// checkLong makes an effect of which the server refuses the first requests, and has done the
// others.
func checkLong(t *testing.T, r *rig, e effect, off, n int64, pieces []piece, refused int, errno u32) {
	is := r.effect(func() error { return e.f(r.c, off, n) })
	r.expect(e.command, e.flags, errno, pieces[:refused]...)
	ends := refused == len(pieces) && refused > 0 // No shorter one is tried.
	r.expect(e.command, e.flags, 0, pieces[refused:]...)
	if err := (<-is).err; (err != nil) != ends {
		t.Errorf("%d bytes at %d: %v", n, off, err)
	} else if ends {
		checkIs(t, err, errnos[errno])
	}
}

// TestFastZero holds that what is to be done at once is not done in pieces.
func TestFastZero(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		zero := func(n int64) <-chan result {
			return r.effect(func() error { return r.c.Zero(0, n, backends.ZeroFast) })
		}
		for _, errno := range []u32{22, 75, 95} {
			is := zero(10000)
			r.expect(cmdZeroes, 0x10, errno, piece{0, 10000})
			checkIs(t, (<-is).err, errnos[errno])
		}
		is := zero(1 << 32)
		if r.form == extended {
			r.expect(cmdZeroes, 0x10, 0, piece{0, 1 << 32})
		} else if err := (<-is).err; !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("4 GiB: %v", err)
		}
		r.works()
	}, blocks(1, 4096))
}

// TestEffectErrors holds that only what may be due to the length of a request has it made in
// pieces, and that an error ends what has begun.
func TestEffectErrors(t *testing.T) {
	for _, e := range effects {
		each(t, forms, func(t *testing.T, r *rig) {
			for errno, want := range errnos {
				if errno == 22 || errno == 75 {
					continue
				}
				is := r.effect(func() error { return e.f(r.c, 0, 10000) })
				r.expect(e.command, e.flags, errno, piece{0, 10000})
				checkIs(t, (<-is).err, want)
				is = r.effect(func() error { return e.f(r.c, 0, 10000) })
				r.expect(e.command, e.flags, 75, piece{0, 10000})
				r.expect(e.command, e.flags, 0, piece{0, 4096})
				r.expect(e.command, e.flags, errno, piece{4096, 4096})
				checkIs(t, (<-is).err, want)
			}
			r.works()
		}, blocks(1, 4096))
	}
}
