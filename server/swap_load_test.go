package server_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A retiree is a disk that must not be used any more at some time.
type retiree struct {
	*disk
	retired atomic.Bool
}

// TestSwapUnderLoad swaps to a copy, again and again, while several connections read and write:
// every read is what was written last, no backend is called after it was replaced, and none while
// the copy is made.
func TestSwapUnderLoad(t *testing.T) {
	const users, block, blocks, swaps = 8, 1536, 16, 60
	make1 := func(data []byte) *retiree {
		r := &retiree{disk: &disk{data: data}}
		r.before = func(op string, off, _ int64) error {
			if r.retired.Load() {
				t.Errorf("%s at %d after the backend was replaced", op, off)
			}
			r.mu.Lock()
			r.calls = nil
			r.mu.Unlock()
			if off%5 == 0 {
				<-time.After(20 * time.Microsecond)
			}
			return nil
		}
		return r
	}
	now := make1(make([]byte, users*block*blocks))
	e := export(t, now, server.Options{BlockSize: 512})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var reads atomic.Int64
	sessions := []*session{connectSockets(t, e), connectSockets(t, e), connectSockets(t, e)}
	for user := range users {
		s, rng := sessions[user%len(sessions)], rand.New(rand.NewPCG(uint64(user), 1))
		wg.Go(func() {
			model := make([][]byte, blocks)
			for i := range model {
				model[i] = make([]byte, block)
			}
			for {
				select {
				case <-stop:
					return
				default:
				}
				i := rng.IntN(blocks)
				q := call{op: cmdRead, offset: uint64((i*users + user) * block), length: block}
				if rng.IntN(2) == 0 {
					model[i] = bytes.Repeat([]byte{byte(rng.Uint32())}, block)
					q.op, q.data = cmdWrite, model[i]
					s.expect(0, q)
					continue
				}
				if got := s.expect(0, q); !bytes.Equal(got, model[i]) {
					t.Errorf("user %d: block %d differs from the model", user, i)
					return
				}
				reads.Add(1)
			}
		})
	}
	for range swaps {
		before := reads.Load()
		old := now
		if err := e.SwapFunc(t.Context(), func() (backends.Backend, error) {
			now = make1(bytes.Clone(old.data))
			return now, nil
		}); err != nil {
			t.Error(err)
		}
		old.retired.Store(true)
		clear(old.data)
		for reads.Load() < before+20 && !t.Failed() {
			<-time.After(time.Millisecond)
		}
	}
	close(stop)
	wg.Wait()
	for _, s := range sessions {
		s.disconnect()
	}
}
