package server_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/server"
)

// TestOracle runs mixed requests over four connections at once, several in flight on each, and
// compares every read with a model. Each of the users owns every n-th block, so neighbours share
// sectors of the disk but never a byte.
func TestOracle(t *testing.T) {
	const (
		connections = 4
		perConn     = 4
		users       = connections * perConn
		block       = 3 << 9 // straddles pages
		blocks      = 32     // per user
		rounds      = 400
	)
	d := newDisk(users * blocks * block)
	e := export(t, d, server.Options{BlockSize: 512})
	var wg sync.WaitGroup
	for c := range connections {
		ours, theirs := socketpair(t)
		s := (&session{client: newClient(t, ours), conn: e.NewConn(theirs, nil)}).run(t)
		var connected sync.WaitGroup
		for u := range perConn {
			connected.Add(1)
			wg.Add(1)
			go func() {
				defer connected.Done()
				defer wg.Done()
				user := c*perConn + u
				model := make([][]byte, blocks)
				for i := range model {
					model[i] = make([]byte, block)
				}
				rng := rand.New(rand.NewPCG(uint64(user), 1))
				for range rounds {
					i := rng.IntN(blocks)
					q := call{offset: uint64((i*users + user) * block), length: block}
					switch rng.IntN(6) {
					case 0, 1:
						q.op = cmdRead
						if got := s.expect(0, q); !bytes.Equal(got, model[i]) {
							t.Errorf("user %d: block %d differs from the model", user, i)
							return
						}
						continue
					case 2, 3:
						q.op, q.flags = cmdWrite, uint16(rng.IntN(2))*fua
						q.data = bytes.Repeat([]byte{byte(rng.Uint32())}, block)
						model[i] = q.data
					case 4:
						q.op, q.flags = cmdZero, uint16(rng.IntN(4))
						model[i] = make([]byte, block)
					case 5:
						q = call{op: cmdFlush}
					}
					s.expect(0, q)
				}
			}()
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			connected.Wait()
			s.disconnect()
		}()
	}
	wg.Wait()
	if n := total(e.Stats()); n != users*rounds {
		t.Errorf("%d requests counted, want %d", n, users*rounds)
	}
}
