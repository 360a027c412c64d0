package backendtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
)

// A subject is the backend under test, with requests that check what every
// request has to keep. Its failures are errors of the test, not return values.
type subject struct {
	testing.TB
	dev  backends.Device
	opts Options
	rng  *rand.Rand
	size int64
	unit int64 // offsets and lengths are multiples of it
	most int64 // the longest read or write
}

// maxRequest is the longest request of the kit where the backend has no limit.
const maxRequest = 256 << 10

func newSubject(t testing.TB, b backends.Backend, opts Options) *subject {
	s := &subject{TB: t, dev: backends.Probe(b), opts: opts, unit: 1, most: maxRequest}
	s.rng = rand.New(rand.NewPCG(opts.Seed, 0))
	s.size = b.Size()
	if m := s.dev.BlockSizes.Minimum; m > 0 {
		s.unit = int64(m)
	}
	if m := s.dev.BlockSizes.Maximum; m > 0 {
		s.most = min(s.most, int64(m))
	}
	s.most = max(s.most/s.unit*s.unit, s.unit)
	return s
}

// spans are the parts of the device that random requests go to: both ends.
func (s *subject) spans() [][2]int64 {
	const most = 2 << 20
	size := s.size / s.unit * s.unit
	if size <= 2*most {
		return [][2]int64{{0, size}}
	}
	return [][2]int64{{0, most}, {size - most, size}}
}

// random picks a range of units inside [lo, hi), at least one, at most limit
// bytes long: mostly short, often beside a boundary that a backend may care
// about.
func (s *subject) random(rng *rand.Rand, lo, hi, limit int64) (off, n int64) {
	units := (hi - lo) / s.unit
	first := rng.Int64N(units)
	if rng.IntN(2) == 0 {
		boundary := int64(4096) << (4 * rng.IntN(2)) // a page, a chunk
		near := (lo + first*s.unit) / boundary * boundary / s.unit
		near += rng.Int64N(3) - 1 - lo/s.unit
		first = min(max(near, 0), units-1)
	}
	longest := min(units-first, max(limit/s.unit, 1))
	n = 1 + rng.Int64N(longest)
	if rng.IntN(4) != 0 {
		n = 1 + rng.Int64N(min(longest, max(8192/s.unit, 1)))
	}
	return lo + first*s.unit, n * s.unit
}

// fill returns n random bytes, none of them zero: what is lost shows.
func fill(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n+7)
	for i := 0; i < int(n); i += 8 {
		binary.NativeEndian.PutUint64(p[i:], rng.Uint64()|0x0101010101010101)
	}
	return p[:n:n]
}

// canary surrounds the buffer of a read, to see whether it stays inside.
const canary = "canaries"

// read is ReadAt. It returns nil after a failure.
func (s *subject) read(off, n int64) []byte {
	s.Helper()
	room := make([]byte, n+16)
	before, p, behind := room[:8], room[8:8+n:8+n], room[8+n:]
	copy(before, canary)
	copy(behind, canary)
	got, err := s.dev.ReadAt(p, off)
	if !s.complete("ReadAt", off, n, got, err) {
		return nil
	}
	if string(before) != canary || string(behind) != canary {
		s.Errorf("ReadAt of %d bytes at %d wrote outside its buffer", n, off)
		return nil
	}
	return p
}

// complete checks the result of a ReadAt or WriteAt. A full count is success,
// also with io.EOF beside it.
func (s *subject) complete(op string, off, n int64, got int, err error) bool {
	s.Helper()
	switch {
	case int64(got) == n && (err == nil || errors.Is(err, io.EOF)):
		return true
	case err != nil:
		s.Errorf("%s of %d bytes at %d: %d bytes, %v", op, n, off, got, err)
	default:
		s.Errorf("%s of %d bytes at %d: %d bytes and no error", op, n, off, got)
	}
	return false
}

// write is WriteAt.
func (s *subject) write(off int64, p []byte) bool {
	s.Helper()
	return s.writeWith("WriteAt", s.dev.WriterAt.WriteAt, off, p)
}

func (s *subject) writeFUA(off int64, p []byte) bool {
	s.Helper()
	return s.writeWith("WriteAtFUA", s.dev.FUAWriter.WriteAtFUA, off, p)
}

func (s *subject) writeWith(op string, write func([]byte, int64) (int, error), off int64, p []byte) bool {
	s.Helper()
	lent := bytes.Clone(p)
	n, err := write(lent, off)
	if !s.complete(op, off, int64(len(p)), n, err) {
		return false
	}
	if !bytes.Equal(lent, p) {
		s.Errorf("%s of %d bytes at %d changed its argument", op, len(p), off)
		return false
	}
	clear(lent) // the backend had it for the call only: a kept reference will show
	return true
}

// check tells whether err is nil.
func (s *subject) check(err error, op string, off, n int64) bool {
	s.Helper()
	if err != nil {
		s.Errorf("%s of %d bytes at %d: %v", op, n, off, err)
	}
	return err == nil
}

// equal compares what was read at off with what should be there.
func (s *subject) equal(after string, off int64, got, want []byte) bool {
	s.Helper()
	if got == nil && len(want) > 0 { // reported where it was read
		return false
	}
	i := mismatch(got, want)
	if i < 0 {
		return true
	}
	s.Errorf("%s: byte %d (%d of the %d at %d) is %#02x, want %#02x",
		after, off+int64(i), i, len(want), off, got[i], want[i])
	return false
}

// mismatch returns the first index at which two slices of one length differ; -1
// if none.
func mismatch(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}
