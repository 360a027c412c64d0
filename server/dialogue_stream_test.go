package server_test

import "bytes"

// A stream is bytes of a dialogue, in pieces that repeat: so large payloads take no memory. Its
// methods leave what it was before as it is.
type stream []piece

// A piece is some bytes, as often as times says.
type piece struct {
	unit  []byte
	times uint64
}

// with returns the stream with a piece behind it.
func (s stream) with(p piece) stream {
	if len(p.unit) == 0 || p.times == 0 {
		return s
	}
	return append(s[:len(s):len(s)], p)
}

// then returns the stream with another one behind it.
func (s stream) then(t stream) stream { return append(s[:len(s):len(s)], t...) }

// size returns the number of bytes.
func (s stream) size() (n uint64) {
	for _, p := range s {
		n += uint64(len(p.unit)) * p.times
	}
	return n
}

// head returns the first n bytes, or all where there are fewer.
func (s stream) head(n int) (b []byte) {
	for _, p := range s {
		missing := n - len(b)
		times := min(p.times, uint64(missing/len(p.unit)+1))
		b = append(b, bytes.Repeat(p.unit, int(times))...)
		if len(b) >= n {
			return b[:n]
		}
	}
	return b
}

// drop returns the stream without its first n bytes. There are as many.
func (s stream) drop(n uint64) stream {
	for n > 0 {
		p, rest := s[0], s[1:]
		unit := uint64(len(p.unit))
		if n >= unit*p.times {
			n -= unit * p.times
			s = rest
			continue
		}
		p.times -= n / unit
		cut := stream{}
		if n %= unit; n > 0 {
			p.times--
			cut = cut.with(piece{p.unit[n:], 1})
		}
		return cut.with(p).then(rest)
	}
	return s
}
