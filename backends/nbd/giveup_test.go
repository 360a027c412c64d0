package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// scribble writes to memory that is the caller's again, and returns a check that nobody else does.
func scribble(t testing.TB, p []byte) func() {
	for i := range p {
		p[i] = 0xee
	}
	return func() {
		t.Helper()
		if n := bytes.Count(p, []byte{0xee}); n != len(p) {
			t.Errorf("%d of %d bytes of the caller were written to", len(p)-n, len(p))
		}
	}
}

// TestGiveUp holds that a read ends with its context wherever it is, that its memory is the
// caller's then, and that the rest of the reply does no harm.
func TestGiveUp(t *testing.T) {
	// before is said before the read is given up, and after is said behind it.
	cases := map[string]func(r *rig, q query) (before, after []byte){
		"without a reply": func(r *rig, q query) (before, after []byte) {
			return nil, r.filled(q, pattern(q.offset, int(q.length)))
		},
		"without a reply, which is an error": func(r *rig, q query) (before, after []byte) {
			return nil, r.failed(q, 5, "no")
		},
		"in the header": func(r *rig, q query) (before, after []byte) {
			b := r.filled(q, pattern(q.offset, int(q.length)))
			return b[:10], b[10:]
		},
		"before the data": func(r *rig, q query) (before, after []byte) {
			b := r.filled(q, pattern(q.offset, int(q.length)))
			n := len(b) - int(q.length)
			return b[:n], b[n:]
		},
		"in the data": func(r *rig, q query) (before, after []byte) {
			b := r.filled(q, pattern(q.offset, int(q.length)))
			return b[:len(b)/2], b[len(b)/2:]
		},
		"before the last byte": func(r *rig, q query) (before, after []byte) {
			b := r.filled(q, pattern(q.offset, int(q.length)))
			return b[:len(b)-1], b[len(b)-1:]
		},
		"between data": func(r *rig, q query) (before, after []byte) {
			half := q.length / 2
			return r.chunk(q, 0, chunkData, u64(q.offset), make([]byte, half)),
				r.chunk(q, done, chunkData, u64(q.offset+half), make([]byte, q.length-half))
		},
		"before a hole": func(r *rig, q query) (before, after []byte) {
			half := q.length / 2
			return r.chunk(q, 0, chunkData, u64(q.offset), make([]byte, half)),
				cat(r.chunk(q, 0, chunkHole, u64(q.offset+half), u32(q.length-half)), r.chunk(q, done, chunkNone))
		},
		"before an error": func(r *rig, q query) (before, after []byte) {
			return r.chunk(q, 0, chunkHole, u64(q.offset), u32(q.length)), r.chunk(q, done, chunkError, u32(5), u16(0))
		},
	}
	for name, says := range cases {
		for _, n := range []int{3, 1000, 16<<10 - 1, 16 << 10, 200 << 10} {
			for _, f := range forms {
				if f == simple && (name[:4] == "betw" || name == "before a hole" || name == "before an error") {
					continue
				}
				t.Run(fmt.Sprintf("%s, %d, %v", name, n, f), func(t *testing.T) {
					bubble(t, f, func(t *testing.T, r *rig) {
						ctx, end := endable(t)
						p := make([]byte, n)
						is := r.readContext(ctx, p, wrongOffset)
						q := r.next()
						before, after := says(r, q)
						r.say(before)
						synctest.Wait()
						if len(is) > 0 {
							t.Fatalf("it does not wait: %+v", <-is)
						}
						end()
						got := <-is
						check := scribble(t, p)
						if got.n != 0 || !errors.Is(got.err, errGivenUp) {
							t.Errorf("%d, %v", got.n, got.err)
						}
						other := r.write(pattern(0, 100), 0) // It waits meanwhile.
						w := r.next()
						r.say(after, r.ok(w))
						if got := <-other; got.err != nil {
							t.Error(got.err)
						}
						r.works()
						check()
					})
				})
			}
		}
	}
}

// TestGiveUpInTurn holds that who waits for others can give up, and that requests that were given
// up count until they are answered.
func TestGiveUpInTurn(t *testing.T) {
	for _, f := range forms {
		bubbleWith(t, f, nbd.Options{MaxInFlight: 2}, func(t *testing.T, r *rig) {
			ctx, end := endable(t)
			var all []<-chan result
			for range 5 {
				all = append(all, r.readContext(ctx, make([]byte, 100), 0))
			}
			first, second := r.next(), r.next()
			synctest.Wait()
			end()
			for _, is := range all {
				checkIs(t, (<-is).err, errGivenUp)
			}
			p := make([]byte, 100)
			is := r.read(p, 777)
			arrived := make(chan query, 1)
			go func() { arrived <- r.next() }()
			synctest.Wait()
			if len(arrived) > 0 {
				t.Errorf("there are three requests in flight: %+v", <-arrived)
			}
			r.say(r.failed(second, 5, ""))
			q := <-arrived
			r.say(r.filled(q, pattern(777, 100)), r.filled(first, make([]byte, 100)))
			if got := <-is; got.err != nil || !bytes.Equal(p, pattern(777, 100)) {
				t.Errorf("%v, %s", got.err, firstDifference(p, pattern(777, 100)))
			}
			for range 5 {
				r.works()
			}
		})
	}
}

// TestGiveUpUnread holds that who reads can give up also while the server takes nothing, whoever it
// is that sends.
func TestGiveUpUnread(t *testing.T) {
	for _, size := range []int{0, 100, 100 << 10} { // of a WRITE that is in the way
		each(t, forms, func(t *testing.T, r *rig) {
			ctx, end := endable(t)
			var write <-chan result
			if size > 0 {
				write = r.write(make([]byte, size), 0)
				synctest.Wait()
			}
			p, other := make([]byte, 1000), make([]byte, 1000)
			is, more := r.readContext(ctx, p, 0), r.readContext(ctx, other, 0)
			synctest.Wait()
			end()
			checkIs(t, (<-is).err, errGivenUp)
			checkIs(t, (<-more).err, errGivenUp)
			check, checkOther := scribble(t, p), scribble(t, other)
			if size > 0 {
				r.say(r.ok(r.next()))
			}
			for range 2 { // They are sent all the same.
				r.say(r.filled(r.next(), make([]byte, 1000)))
			}
			if size > 0 {
				if got := <-write; got.err != nil {
					t.Error(got.err)
				}
			}
			r.works()
			check()
			checkOther()
		})
	}
}

// TestGiveUpBefore holds that a context that is over has nothing read, and does no harm.
func TestGiveUpBefore(t *testing.T) {
	for _, f := range forms {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			r := newRig(t, f, client, server, nbd.Options{MaxInFlight: 1})
			go r.serve()
			ctx, end := endable(t)
			end()
			for range 50 {
				p := make([]byte, 100)
				got := <-r.readContext(ctx, p, 0)
				check := scribble(t, p)
				if got.err != nil { // It need not look before it reads.
					checkIs(t, got.err, errGivenUp)
				}
				if got, err := r.c.ReadAt(make([]byte, 10), 5); got != 10 || err != nil {
					t.Errorf("%d, %v", got, err)
				}
				check()
			}
		})
	}
}

// TestGiveUpOfPieces holds that a read of several requests ends with the one that is in flight, and
// tells how far it has come.
func TestGiveUpOfPieces(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		ctx, end := endable(t)
		p := make([]byte, 3000)
		is := r.readContext(ctx, p, 0)
		r.expect(cmdRead, 0, 0, piece{0, 1024})
		q := r.next()
		end()
		if got := <-is; got.n != 1024 || !errors.Is(got.err, errGivenUp) || !bytes.Equal(p[:1024], pattern(0, 1024)) {
			t.Errorf("%d, %v", got.n, got.err)
		}
		r.say(r.filled(q, make([]byte, 1024)))
		r.works()
	}, blocks(1, 1024))
}

// TestGiveUpWrite holds that a write that was not sent yet ends with its context, and never is; and
// that one that the server has waits for its answer.
func TestGiveUpWrite(t *testing.T) {
	for _, f := range forms {
		bubbleWith(t, f, nbd.Options{MaxInFlight: 1}, func(t *testing.T, r *rig) {
			ctx, end := endable(t)
			write := func(off int64) <-chan result {
				return r.call(func() (int, error) { return r.c.WriteAtContext(ctx, pattern(off, 20<<10), off) })
			}
			sent := write(0)
			q := r.next()
			unsent := write(1 << 20)
			synctest.Wait()
			end()
			got := <-unsent
			if checkIs(t, got.err, errGivenUp); got.n != 0 {
				t.Errorf("%d bytes of it", got.n)
			}
			synctest.Wait()
			if len(sent) > 0 {
				t.Errorf("it does not wait: %+v", <-sent)
			}
			r.say(r.ok(q))
			if got := <-sent; got.n != 20<<10 || got.err != nil {
				t.Errorf("%d, %v", got.n, got.err)
			}
			r.works()
		})
	}
}

// serve answers all requests as they should be, until the connection ends.
func (r *rig) serve() {
	for {
		q, err := r.receive()
		if err != nil || q.command == cmdDisc {
			return
		}
		if q.command == cmdRead {
			r.say(r.filled(q, pattern(q.offset, int(q.length))))
		} else {
			r.say(r.ok(q))
		}
	}
}

// TestGiveUpAnywhere has many callers give up at any time, over sockets with and without TLS: who
// goes on gets what is right, and who has given up has memory of its own.
func TestGiveUpAnywhere(t *testing.T) {
	authority := certs.New(t)
	for _, f := range forms {
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, TLS %v", f, secure), func(t *testing.T) {
				local, remote := socketpair(t)
				var client, server net.Conn = local, remote
				if secure {
					server = tls.Server(remote, &tls.Config{Certificates: []tls.Certificate{authority.Server}})
					client = tls.Client(local, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool})
				}
				r := newRig(t, f, client, server, nbd.Options{MaxInFlight: 8})
				go r.serve()
				var all sync.WaitGroup
				for i := range 16 {
					all.Go(func() { giveUps(t, r, rand.New(rand.NewPCG(uint64(i), uint64(f)))) })
				}
				all.Wait()
				if err := r.c.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// giveUps is a caller who reads, and gives up now and then.
func giveUps(t *testing.T, r *rig, random *rand.Rand) {
	for range 30 {
		n := 1 + random.IntN(1<<(1+random.IntN(17)))
		off := int64(random.IntN(1 << 30))
		p := make([]byte, n)
		ctx, cancel := context.WithCancelCause(context.Background())
		is := r.readContext(ctx, p, off)
		if random.IntN(2) == 0 {
			spin(random.IntN(100))
			cancel(errGivenUp)
		}
		got := <-is
		cancel(nil)
		if got.err != nil {
			checkIs(t, got.err, errGivenUp)
			check := scribble(t, p)
			spin(50)
			check()
			continue
		}
		if diff := firstDifference(p, pattern(off, n)); diff != "" {
			t.Error(diff)
		}
	}
}

// spin has others run for a while.
func spin(n int) {
	for range n {
		runtime.Gosched()
	}
}
