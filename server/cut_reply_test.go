package server_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
)

// others are the requests that script has not, the last of which ends the connection.
func others() []call {
	return []call{
		{op: cmdZero, offset: 512, length: 512},
		{op: cmdZero, flags: fua | noHole, offset: 1024, length: 512},
		{op: cmdTrim, flags: fua, offset: 2048, length: 512},
		{op: cmdFlush},
		{op: cmdDisc},
	}
}

// TestKilledClientOthers cuts the connection at every byte of them: what has come whole is
// executed, and nothing else.
func TestKilledClientOthers(t *testing.T) {
	calls := others()
	stream, starts := encodeScript(calls)
	answered := len(calls) - 1
	for _, character := range characters {
		for cut := range len(stream) + 1 {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				for i := range d.data {
					d.data[i] = 'x'
				}
				e := character.export(t, d)
				before := bytes.Clone(d.data)
				conn, result := killed(e, stream[:cut])
				done, boundary := complete(starts, cut)
				want := map[bool]error{true: nil, false: io.ErrUnexpectedEOF}[boundary]
				if err := <-result; !errors.Is(err, want) {
					t.Errorf("%s, cut at %d: %v, want %v", character.name, cut, err, want)
				}
				if st := conn.Stats(); total(st) != min(done, answered) || st.InFlight != 0 {
					t.Errorf("%s, cut at %d: %d requests answered, %d in flight, want %d, 0",
						character.name, cut, total(st), st.InFlight, min(done, answered))
				}
				for _, q := range calls[:min(done, 2)] {
					clear(before[q.offset:][:q.length])
				}
				trimmed := before[2048:2560]
				if done > 2 {
					copy(trimmed, d.data[2048:2560]) // whatever that is
				}
				if !bytes.Equal(d.data, before) {
					t.Errorf("%s, cut at %d: something else is stored", character.name, cut)
				}
				conn.Close()
				next := connect(t, e)
				next.expect(0, call{op: cmdWrite, data: []byte("next")})
				next.disconnect()
			})
		}
	}
}

// TestKilledClientMidReply kills the client when it has taken so many bytes of the replies, for
// every number of them: it may be within the header of one or its data. All requests have come
// whole, and those of which a reply was begun have been executed.
func TestKilledClientMidReply(t *testing.T) {
	const length = 300
	calls := []call{
		{op: cmdRead, length: length},
		{op: cmdWrite, offset: 1024, data: []byte("written")},
		{op: cmdZero, offset: 2048, length: 512},
		{op: cmdRead, offset: 4096, length: length},
		{op: cmdFlush},
	}
	stream, _ := encodeScript(calls)
	replies := len(calls)*16 + 2*length
	step := 1
	if raceEnabled {
		step = 7
	}
	for _, character := range characters {
		for taken := 0; taken <= replies; taken += step {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				e := character.export(t, d)
				ours, theirs := net.Pipe()
				conn := e.NewConn(theirs, nil)
				result := make(chan error, 1)
				go func() { result <- conn.Transmit() }()
				go ours.Write(stream)
				if _, err := io.CopyN(io.Discard, ours, int64(taken)); err != nil {
					t.Errorf("%s, after %d of %d bytes: %v", character.name, taken, replies, err)
				}
				ours.Close()
				<-result // An error or not: the client may have gone before or after the server looked.
				if st := conn.Stats(); st.InFlight != 0 {
					t.Errorf("%s, %d bytes taken: %d requests are in flight for ever",
						character.name, taken, st.InFlight)
				}
				if taken == replies && string(d.data[1024:][:7]) != "written" {
					t.Errorf("%s: a write that was acknowledged is not stored", character.name)
				}
				conn.Close()
				next := connect(t, e)
				if got := next.expect(0, call{op: cmdRead, offset: 1024, length: 7}); string(got) != "written" &&
					!bytes.Equal(got, make([]byte, 7)) {
					t.Errorf("%s, %d bytes taken: %q is stored", character.name, taken, got)
				}
				next.disconnect()
			})
		}
	}
}
