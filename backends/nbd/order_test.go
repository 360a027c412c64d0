package nbd_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestAnyOrder holds that callers get what is theirs, whatever the order of the replies, and of the
// pieces among them.
func TestAnyOrder(t *testing.T) {
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			client, server := socketpair(t)
			r := newRig(t, f, client, server, nbd.Options{})
			const callers, rounds = 64, 5
			var all sync.WaitGroup
			for i := range callers {
				all.Go(func() { // Each has a range of its own, and one in two writes to it.
					for round := range rounds {
						off := int64(i)<<20 + int64(round)<<10
						n := 1 + i*(1+i)*7 // up to 28 KiB: past the sizes at which things are done otherwise
						if i%2 == 1 {
							if got, err := r.c.WriteAt(pattern(off, n), off); got != n || err != nil {
								t.Errorf("wrote %d of %d bytes at %d: %v", got, n, off, err)
							}
							continue
						}
						p := make([]byte, n)
						got, err := r.c.ReadAt(p, off)
						if diff := firstDifference(p, pattern(off, n)); got != n || err != nil || diff != "" {
							t.Errorf("read %d of %d bytes at %d: %v, %s", got, n, off, err, diff)
						}
					}
				})
			}
			random := rand.New(rand.NewPCG(uint64(f), 1))
			for range rounds { // Each has one request in flight.
				var replies [][][]byte
				var order []int // whose turn it is; the pieces of each stay in order
				for i := range callers {
					replies = append(replies, r.pieces(r.next(), random))
					for range replies[i] {
						order = append(order, i)
					}
				}
				random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
				var b []byte
				for _, i := range order {
					b = append(b, replies[i][0]...)
					replies[i] = replies[i][1:]
				}
				r.say(b)
			}
			all.Wait()
			r.works()
		})
	}
}

// pieces is the reply to a request, whose data must be right if it is a WRITE, in up to four
// pieces.
func (r *rig) pieces(q query, random *rand.Rand) [][]byte {
	if q.command == cmdWrite {
		if diff := firstDifference(q.data, pattern(q.offset, int(q.length))); diff != "" {
			r.t.Errorf("%d bytes at %d: %s", q.length, q.offset, diff)
		}
		return [][]byte{r.ok(q)}
	}
	data := pattern(q.offset, int(q.length))
	if r.form == simple {
		return [][]byte{r.filled(q, data)}
	}
	var all [][]byte
	for at := 0; at < len(data); {
		n := len(data) - at
		if len(all) < 2 {
			n = 1 + random.IntN(n)
		}
		all = append(all, r.chunk(q, 0, chunkData, u64(q.offset)+u64(at), data[at:at+n]))
		at += n
	}
	return append(all, r.chunk(q, done, chunkNone))
}

// TestMaxInFlight holds that no more requests are in flight than the caller wants, and that the
// others wait for those.
func TestMaxInFlight(t *testing.T) {
	for _, most := range []int{1, 3, 128} {
		for _, f := range forms {
			t.Run(fmt.Sprint(f, " ", most), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					client, server := net.Pipe()
					// 128 is what there is without the option.
					r := newRig(t, f, client, server, nbd.Options{MaxInFlight: most % 128})
					arrived := make(chan query, 1000)
					go func() {
						defer close(arrived)
						for {
							q, err := r.receive()
							if err != nil {
								return
							}
							arrived <- q
						}
					}()
					const callers = 300
					var all []<-chan result
					for i := range callers {
						if i%2 == 0 {
							all = append(all, r.read(make([]byte, 10), int64(i)))
						} else {
							all = append(all, r.effect(r.c.Sync))
						}
					}
					for range callers {
						synctest.Wait()
						if n := len(arrived); n > most || n == 0 {
							t.Fatalf("%d requests are in flight, want %d", n, most)
						}
						q := <-arrived
						if q.command == cmdRead {
							r.say(r.filled(q, make([]byte, 10)))
						} else {
							r.say(r.ok(q))
						}
					}
					for _, is := range all {
						if got := <-is; got.err != nil {
							t.Error(got.err)
						}
					}
					server.Close()
					for range arrived {
						t.Error("one request too many")
					}
				})
			})
		}
	}
}
