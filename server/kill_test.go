package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A character is how a disk is served.
type character struct {
	name   string
	direct bool // takes and gives data without blocking
	quick  bool // has proved so, and needs no workers
}

var characters = []character{{name: "workers"}, {name: "quick", quick: true}, {name: "direct", direct: true}}

// export offers d in its character.
func (c character) export(t *testing.T, d *disk) *server.Export {
	return c.serveWith(t, d, server.Options{})
}

func (c character) serveWith(t *testing.T, d *disk, o server.Options) *server.Export {
	var b backends.Backend = d
	if c.direct {
		b = directDisk{d}
	}
	e := export(t, b, o)
	if c.quick {
		s := connect(t, e)
		warm(s.client)
		s.disconnect()
	}
	return e
}

// killed has e serve a client that sends data, takes what comes, and goes when there is nothing
// more to be done for it. result is what the service ends with.
func killed(e *server.Export, data []byte) (conn *server.Conn, result <-chan error) {
	ours, theirs := net.Pipe()
	conn = e.NewConn(theirs, nil)
	ended := make(chan error, 1)
	go func() { ended <- conn.Transmit() }()
	go io.Copy(io.Discard, ours)
	ours.Write(data)
	synctest.Wait()
	ours.Close()
	return conn, ended
}

// TestKilledClientBusy kills the client at every byte of a burst while the backend is at work on
// what came before that byte, and stuck. Meanwhile others are served; when the backend goes on, the
// requests that workers have are executed, those before which the connection's goroutine finds its
// client gone may not be, and no others.
func TestKilledClientBusy(t *testing.T) {
	const spare = 7168 // where the backend is not stuck
	calls := script()
	for i := range calls {
		calls[i].data = calls[i].data[:min(len(calls[i].data), 3)]
	}
	stream, starts := encodeScript(calls)
	step := 1
	if raceEnabled {
		step = 3
	}
	for _, character := range characters {
		for cut := 0; cut <= len(stream); cut += step {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				e := character.export(t, d)
				before := total(e.Stats())
				release := make(chan struct{})
				d.before = func(op string, off, n int64) error {
					if off != spare {
						<-release
					}
					return nil
				}
				conn, result := killed(e, stream[:cut])
				synctest.Wait()

				done, boundary := complete(starts, cut)
				if st := conn.Stats(); (st.InFlight > 0) != (done > 0) {
					t.Errorf("cut at %d: %d of %d requests in flight", cut, st.InFlight, done)
				}
				next := connect(t, e)
				next.expect(0, call{op: cmdRead, offset: spare, length: 1})
				close(release)
				err := <-result
				if cut == 0 && err != nil || !boundary && err == nil {
					t.Errorf("cut at %d: %v", cut, err)
				}
				st := conn.Stats()
				if st.InFlight != 0 || st.Oldest != 0 {
					t.Errorf("cut at %d: %d requests in flight for %v, want none", cut, st.InFlight, st.Oldest)
				}
				workers := !character.direct && !character.quick
				if n := total(st); n > done || n < done && workers {
					t.Errorf("cut at %d: %d requests answered, want %d", cut, n, done)
				}
				for i, q := range calls {
					if q.op != cmdWrite || q.offset >= 8192 {
						continue
					}
					if executed := bytes.Contains(d.data, q.data); executed && i >= done ||
						!executed && i < done && workers {
						t.Errorf("cut at %d: request %d of %d executed: %v", cut, i, done, executed)
					}
				}
				next.expect(0, call{op: cmdWrite, offset: spare, data: []byte("next")})
				next.disconnect()
				if n := total(e.Stats()) - before; n != total(st)+2 {
					t.Errorf("cut at %d: %d requests answered in all, want %d and two", cut, n, total(st))
				}
			})
		}
	}
}

// TestKilledClientLargeWrite kills the client while a large write, which does not pass through the
// receive buffer, is on its way among reads. A write that has not come whole leaves no trace, but
// for a backend that takes data as they come: there it may be done in part.
func TestKilledClientLargeWrite(t *testing.T) {
	const size = 200 << 10
	payload := bytes.Repeat([]byte("x"), size)
	stream, starts := encodeScript([]call{{op: cmdRead, length: 512}, {op: cmdWrite, data: payload},
		{op: cmdRead, length: 512}})
	first := starts[1] // byte of the write
	var cuts []int
	for _, near := range []int{first, first + 28, first + 28 + 100, first + 4096, first + 64<<10, first + 128<<10,
		starts[2]} {
		for cut := near - 2; cut <= near+2; cut++ {
			cuts = append(cuts, cut)
		}
	}
	step := 10007
	if raceEnabled {
		step *= 5
	}
	for at := first; at < len(stream); at += step {
		cuts = append(cuts, at)
	}
	for _, character := range characters {
		for _, cut := range cuts {
			for name, kill := range map[string]func(*net.UnixConn) error{
				"half closed": (*net.UnixConn).CloseWrite, "closed": (*net.UnixConn).Close,
			} {
				t.Run(fmt.Sprint(character.name, " ", name, " at ", cut), func(t *testing.T) {
					d := newDisk(1 << 20)
					e := character.export(t, d)
					ours, theirs := socketpair(t)
					conn := e.NewConn(theirs, nil)
					result := make(chan error, 1)
					go func() { result <- conn.Transmit() }()
					if _, err := ours.Write(stream[:cut]); err != nil {
						t.Fatal(err)
					}
					if err := kill(ours); err != nil {
						t.Fatal(err)
					}
					err := <-result
					done, boundary := complete(starts, cut)
					st := conn.Stats()
					if name == "half closed" {
						want := map[bool]error{true: nil, false: io.ErrUnexpectedEOF}[boundary]
						if !errors.Is(err, want) {
							t.Errorf("%v, want %v", err, want)
						}
						if total(st) != done {
							t.Errorf("%d requests answered, want %d", total(st), done)
						}
					}
					if total(st) > done || st.InFlight != 0 {
						t.Errorf("%d requests answered of %d, %d in flight", total(st), done, st.InFlight)
					}
					stored := bytes.Count(d.data, []byte("x"))
					whole := st.Write.Requests == 1
					if whole && stored != size || !whole && !character.direct && stored != 0 {
						t.Errorf("%d bytes stored of a write, whole: %v", stored, whole)
					}
					next := connectSockets(t, e)
					if got := next.expect(0, call{op: cmdRead, length: size}); bytes.Count(got, []byte("x")) != stored {
						t.Error("what is stored is not what is read")
					}
					next.disconnect()
				})
			}
		}
	}
}
