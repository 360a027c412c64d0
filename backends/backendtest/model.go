package backendtest

import (
	"bytes"
	"errors"
	"math/rand/v2"

	"github.com/nbdctl/nbdctl/backends"
)

// A model is what a part of the device should read as. Its requests go to the
// backend and to the model; they report whether the two still agree, as far as
// was looked.
type model struct {
	*subject
	base int64
	data []byte
}

// newModel takes what the backend reads as now for right. nil after a failure.
func newModel(s *subject, lo, hi int64) *model {
	m := &model{subject: s, base: lo, data: make([]byte, 0, hi-lo)}
	for off := lo; off < hi; off += s.most {
		p := s.read(off, min(s.most, hi-off))
		if p == nil {
			return nil
		}
		m.data = append(m.data, p...)
	}
	return m
}

func (m *model) end() int64 { return m.base + int64(len(m.data)) }

// at is the model of a range; writing to it changes the model.
func (m *model) at(off, n int64) []byte {
	return m.data[off-m.base:][:n:n]
}

func (m *model) write(off int64, p []byte) bool {
	copy(m.at(off, int64(len(p))), p)
	return m.subject.write(off, p)
}

func (m *model) writeFUA(off int64, p []byte) bool {
	copy(m.at(off, int64(len(p))), p)
	return m.subject.writeFUA(off, p)
}

func (m *model) zero(off, n int64, flags backends.ZeroFlags) bool {
	err := m.dev.Zeroer.Zero(off, n, flags)
	if errors.Is(err, errors.ErrUnsupported) { // and nothing has changed
		return true
	}
	clear(m.at(off, n))
	return m.check(err, "Zero", off, n)
}

func (m *model) cache(off, n int64) bool { return m.check(m.dev.Cacher.Cache(off, n), "Cache", off, n) }

// trim also finds out what the range reads as from now on: each byte is as
// before, or zero.
func (m *model) trim(off, n int64) bool {
	if !m.check(m.dev.Trimmer.Trim(off, n), "Trim", off, n) {
		return false
	}
	for end := off + n; off < end; off += m.most {
		got := m.read(off, min(m.most, end-off))
		if got == nil {
			return false
		}
		want := m.at(off, int64(len(got)))
		zeros := make([]byte, len(got))
		for i := 0; ; i++ { // on to the next byte that is not zero
			next := mismatch(got[i:], zeros[i:])
			if next < 0 {
				break
			}
			i += next
			if m.opts.TrimZeroes || got[i] != want[i] {
				m.Errorf("Trim: byte %d is %#02x, was %#02x, and may be zero or, without TrimZeroes, that",
					off+int64(i), got[i], want[i])
				return false
			}
			if bytes.Equal(got[i:], want[i:]) {
				break
			}
		}
		copy(want, got)
	}
	return true
}

// compare reads a range and tells whether it is right.
func (m *model) compare(after string, off, n int64) bool {
	m.Helper()
	for end := off + n; off < end; off += m.most {
		n := min(m.most, end-off)
		if !m.equal(after, off, m.read(off, n), m.at(off, n)) {
			return false
		}
	}
	return true
}

// around compares a range and its neighbours.
func (m *model) around(after string, off, n int64) bool {
	m.Helper()
	lo := max(off-16*m.unit, m.base)
	hi := min(off+n+16*m.unit, m.end())
	return m.compare(after, lo, hi-lo)
}

// step makes one random request inside [lo, hi), of any kind that is offered.
func (m *model) step(rng *rand.Rand, lo, hi int64) bool {
	off, n := m.random(rng, lo, hi, m.most)
	switch op := rng.IntN(16); {
	case op < 4:
		return m.compare("random", off, n)
	case op < 5 && m.dev.ReadTo != nil:
		want := bytes.Clone(m.at(off, n))
		got, ok := m.readTo(off, n, replyRules{room: true})
		return ok && (got == nil || m.equal("random ReadAtTo", off, got, want))
	case op < 6 && m.dev.FUAWriter != nil:
		return m.writeFUA(off, fill(rng, n))
	case op < 8 && m.dev.WriteFrom != nil:
		return m.writeFrom(off, fill(rng, n))
	case op < 10 && m.dev.Trimmer != nil:
		return m.trim(off, n)
	case op < 12 && m.dev.Zeroer != nil:
		return m.zero(off, n, backends.ZeroFlags(rng.IntN(int(zeroFlags))))
	case op < 13 && m.dev.Cacher != nil && rng.IntN(2) == 0:
		return m.cache(off, n)
	case op < 13 && m.dev.Syncer != nil && rng.IntN(8) == 0:
		return m.check(m.dev.Syncer.Sync(), "Sync", 0, 0)
	default:
		return m.write(off, fill(rng, n))
	}
}
