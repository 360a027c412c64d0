package server_test

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/nbdctl/nbdctl/server"
)

// TestImageThatShrinks cuts an image off and writes it anew, all the time, while it is read: every
// read gets the right bytes or EIO, and the connection lives on. The kernel clears what is cut off
// of the folio in which a file ends, so zeros are right too in the place of bytes that have gone
// meanwhile: a read(2) at the same time may see them as well.
func TestImageThatShrinks(t *testing.T) {
	const size = 4 << 20
	reads := 3000
	if raceEnabled {
		reads = 500
	}
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i*131>>7) | 1
	}
	b := newFiled(t, want)
	e := export(t, b, server.Options{})
	s := connectSockets(t, e)

	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		rng := rand.New(rand.NewPCG(1, 2))
		for !stop.Load() {
			end := rng.Int64N(size)
			if err := b.f.Truncate(end); err != nil {
				done <- err
				return
			}
			for end < size {
				n := min(size-end, 1+rng.Int64N(128<<10))
				if _, err := b.f.WriteAt(want[end:end+n], end); err != nil {
					done <- err
					return
				}
				end += n
			}
		}
		done <- nil
	}()

	type read struct {
		call
		reply <-chan reply
	}
	rng := rand.New(rand.NewPCG(3, 4))
	var flying []read
	var right, failed int
	check := func(r read) {
		var p reply
		select {
		case p = <-r.reply:
		case err := <-s.err:
			t.Fatalf("the connection has ended after %d good and %d failed reads: %v", right, failed, err)
		}
		switch {
		case p.errno == eio:
			failed++
		case p.errno != 0:
			t.Errorf("error %d", p.errno)
		default:
			right++
			for i, c := range p.data {
				if c != want[int(r.offset)+i] && c != 0 {
					t.Fatalf("%d bytes at %d: byte %d is %#x, want %#x",
						r.length, r.offset, i, c, want[int(r.offset)+i])
				}
			}
		}
	}
	for range reads {
		n := 1 + rng.IntN([]int{8 << 10, 128 << 10, 256 << 10, 1 << 20, 3 << 20}[rng.IntN(5)])
		q := call{op: cmdRead, offset: uint64(rng.IntN(size - n)), length: uint32(n)}
		flying = append(flying, read{q, s.start(q)})
		if len(flying) == 8 {
			check(flying[0])
			flying = flying[1:]
		}
	}
	for _, r := range flying {
		check(r)
	}
	stop.Store(true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s.disconnect()
	if right == 0 || failed == 0 {
		t.Errorf("%d good and %d failed reads: nothing was tried", right, failed)
	}
	t.Logf("%d good and %d failed reads", right, failed)
}
