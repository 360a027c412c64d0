package server_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestSwap holds that what was there before is executed and made durable by the old backend, and
// everything after by the new one.
func TestSwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, next := newDisk(8192), newDisk(8192)
		e := export(t, old, server.Options{})
		idle, s := connect(t, e), connect(t, e)
		s.expect(0, call{op: cmdWrite, data: []byte("old")})
		if err := e.Sync(t.Context()); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]string{"write 0+3", "sync 0+0"}, old.history()); diff != "" {
			t.Errorf("calls of the backend by a sync (-want +got):\n%s", diff)
		}
		if err := e.Swap(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"sync 0+0", "sync 0+0"}, old.history()); diff != "" {
			t.Errorf("calls of the old backend (-want +got):\n%s", diff)
		}
		s.expect(0, call{op: cmdWrite, data: []byte("new")})
		if got := idle.expect(0, call{op: cmdRead, length: 3}); string(got) != "new" {
			t.Errorf("read %q from the new backend", got)
		}
		s.expect(0, call{op: cmdFlush})
		if diff := cmp.Diff([]string{"write 0+3", "read 0+3", "sync 0+0"}, next.history()); diff != "" {
			t.Errorf("calls of the new backend (-want +got):\n%s", diff)
		}
		if calls := old.history(); len(calls) > 0 {
			t.Errorf("calls of the old backend after the swap: %q", calls)
		}
		idle.disconnect()
		s.disconnect()
		if err := e.Swap(t.Context(), old); err != nil {
			t.Errorf("with nobody connected: %v", err)
		}
	})
}

// A picky disk has limits.
type picky struct {
	plain
	sizes backends.BlockSizes
}

func (p picky) BlockSizes() backends.BlockSizes { return p.sizes }

// TestSwapRefused holds what a new backend must not lack, and that nothing changes if it does.
func TestSwapRefused(t *testing.T) {
	all := ^backends.Caps(0)
	for name, tt := range map[string]struct {
		b           backends.Backend
		unsupported bool
	}{
		"none":           {nil, false},
		"short":          {newDisk(4096), false},
		"long":           {newDisk(16384), false},
		"read-only":      {plain{newDisk(8192), all &^ backends.CapWrite}, true},
		"without trim":   {plain{newDisk(8192), all &^ backends.CapTrim}, true},
		"large blocks":   {picky{plain{newDisk(8192), all}, backends.BlockSizes{Minimum: 1024}}, true},
		"short requests": {picky{plain{newDisk(8192), all}, backends.BlockSizes{Maximum: 65536}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			old := newDisk(8192)
			e := export(t, old, server.Options{BlockSize: 512})
			s := connect(t, e)
			for _, err := range []error{
				e.Swap(t.Context(), tt.b),
				e.SwapFunc(t.Context(), func() (backends.Backend, error) { return tt.b, nil }),
			} {
				if err == nil || errors.Is(err, errors.ErrUnsupported) != tt.unsupported {
					t.Errorf("error %v, unsupported wanted: %t", err, tt.unsupported)
				}
			}
			old.history()
			s.expect(0, call{op: cmdTrim, length: 512})
			if calls := old.history(); len(calls) != 1 {
				t.Errorf("the old backend got %q", calls)
			}
			s.disconnect()
		})
	}
	e := export(t, plain{newDisk(8192), 0}, server.Options{})
	if err := e.Swap(t.Context(), plain{newDisk(8192), 0}); err != nil {
		t.Errorf("from one that can't be written to another: %v", err)
	}
}

// TestSwapFails holds that a swap that can't be finished leaves everything as it was, whatever it
// has come to.
func TestSwapFails(t *testing.T) {
	cause := errors.New("no more patience")
	for name, tt := range map[string]struct {
		before func(op string, off, n int64) error // of the old backend
		next   func() (backends.Backend, error)
		want   error // nil: any
	}{
		"a request that does not end": {
			before: func(op string, _, _ int64) error {
				if op == "write" {
					time.Sleep(time.Minute)
				}
				return nil
			},
			want: cause,
		},
		"a sync that does not end": {
			before: func(op string, _, _ int64) error {
				if op == "sync" {
					time.Sleep(time.Minute)
				}
				return nil
			},
			want: cause,
		},
		"a sync that fails": {
			before: func(op string, _, _ int64) error {
				if op == "sync" {
					return syscall.ENOSPC
				}
				return nil
			},
			want: syscall.ENOSPC,
		},
		"a sync that panics": {
			before: func(op string, _, _ int64) error {
				if op == "sync" {
					panic("no disk")
				}
				return nil
			},
		},
		"a sync that ends its goroutine": {
			before: func(op string, _, _ int64) error {
				if op == "sync" {
					runtime.Goexit()
				}
				return nil
			},
		},
		"no new one": {
			next: func() (backends.Backend, error) { return nil, syscall.EROFS },
			want: syscall.EROFS,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old, next := newDisk(8192), newDisk(8192)
				old.before = tt.before
				e := export(t, old, server.Options{})
				idle, s := connect(t, e), connect(t, e)
				written := s.start(call{op: cmdWrite, data: []byte("old")})
				synctest.Wait()
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(time.Second, func() { cancel(cause) })
				if tt.next == nil {
					tt.next = func() (backends.Backend, error) { return next, nil }
				}
				start := time.Now()
				if err := e.SwapFunc(ctx, tt.next); err == nil || tt.want != nil && !errors.Is(err, tt.want) ||
					time.Since(start) > time.Second {
					t.Errorf("error %v after %v, want %v", err, time.Since(start), tt.want)
				}
				idle.expect(0, call{op: cmdRead, length: 3})
				if p := <-written; p.errno != 0 {
					t.Errorf("the write from before got error %d", p.errno)
				}
				if got := s.expect(0, call{op: cmdRead, length: 3}); string(got) != "old" {
					t.Errorf("read %q", got)
				}
				if calls := next.history(); len(calls) > 0 {
					t.Errorf("the new backend got %q", calls)
				}
				idle.disconnect()
				s.disconnect()
				time.Sleep(time.Hour) // for a sync that was left behind
			})
		})
	}
}

// TestSwapAnywhere swaps at every byte of a stream of requests: each is executed once, as a whole,
// by the right one.
func TestSwapAnywhere(t *testing.T) {
	var stream []byte
	var ends []int
	for i := range 4 {
		stream = append(stream, call{op: cmdWrite, offset: uint64(i) * 100,
			data: bytes.Repeat([]byte{byte(i + 1)}, 100)}.encode(uint64(i))...)
		ends = append(ends, len(stream))
	}
	for cut := range len(stream) + 1 {
		synctest.Test(t, func(t *testing.T) {
			old, next := newDisk(8192), newDisk(8192)
			e := export(t, old, server.Options{})
			ours, theirs := net.Pipe()
			defer ours.Close()
			c := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- c.Transmit() }()
			answers := make(chan reply, len(ends))
			go func() {
				for {
					p, err := readReply(ours, func(uint64) int { return 0 })
					if err != nil {
						return // the test is over
					}
					answers <- p
				}
			}()
			ours.Write(stream[:cut])
			synctest.Wait()
			if err := e.Swap(t.Context(), next); err != nil {
				t.Errorf("cut at %d: %v", cut, err)
			}
			ours.Write(stream[cut:])
			for range ends {
				if p := <-answers; p.errno != 0 {
					t.Errorf("cut at %d: request %d got error %d", cut, p.cookie, p.errno)
				}
			}
			ours.Write(call{op: cmdDisc}.encode(0))
			checkError(t, <-result, nil)
			for i, end := range ends {
				has, lacks := next, old
				if cut >= end {
					has, lacks = old, next
				}
				if has.data[i*100+99] != byte(i+1) || lacks.data[i*100] != 0 {
					t.Errorf("cut at %d: request %d was executed by the wrong one", cut, i)
				}
			}
		})
	}
}

// TestSwapInPayload swaps while the payload of a large write is on its way into the old backend's
// own memory.
func TestSwapInPayload(t *testing.T) {
	const n = 1 << 20
	next := directDisk{newDisk(n)}
	e := export(t, directDisk{newDisk(n)}, server.Options{})
	s := connectSockets(t, e)
	data := bytes.Repeat([]byte("payload."), n/8)
	whole := call{op: cmdWrite, data: data}.encode(42)
	answer := make(chan reply, 1)
	s.mu.Lock()
	s.waiting[42] = waiter{reply: answer}
	s.mu.Unlock()
	s.nc.Write(whole[:n/2])
	if err := e.Swap(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	s.nc.Write(whole[n/2:])
	if p := <-answer; p.errno != 0 {
		t.Errorf("error %d", p.errno)
	}
	s.disconnect()
	if !bytes.Equal(next.data, data) {
		t.Error("the write has not arrived whole in the new backend")
	}
}

// TestSwapAwaitsSync holds that the old backend is free when Swap returns, also where a sync of it
// was given up before.
func TestSwapAwaitsSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, next := newDisk(8192), newDisk(8192)
		release := make(chan struct{})
		var syncs atomic.Int32
		old.before = func(op string, _, _ int64) error {
			if op == "sync" && syncs.Add(1) == 1 {
				<-release
			}
			return nil
		}
		e := export(t, old, server.Options{})
		hasty, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		checkError(t, e.Sync(hasty), context.DeadlineExceeded)
		hasty, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		checkError(t, e.Swap(hasty, next), context.DeadlineExceeded)
		swapped := make(chan error, 1)
		go func() { swapped <- e.Swap(t.Context(), next) }()
		synctest.Wait()
		if len(swapped) > 0 || syncs.Load() != 1 {
			t.Errorf("%d swaps, %d syncs beside one that hangs", len(swapped), syncs.Load())
		}
		close(release)
		checkError(t, <-swapped, nil)
	})
}

// TestSwapSyncLoss holds that a backend which tells once that it could not be synced is not
// believed the next time: whoever is told, and even if nobody waits for it any more, what is lost
// stays known.
func TestSwapSyncLoss(t *testing.T) {
	for _, givenUp := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			old, next := newDisk(8192), newDisk(8192)
			var syncs atomic.Int32
			old.before = func(op string, _, _ int64) error {
				if op != "sync" || syncs.Add(1) > 1 {
					return nil
				}
				if givenUp {
					time.Sleep(2 * time.Second)
				}
				return syscall.ENOSPC
			}
			e := export(t, old, server.Options{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			want := error(syscall.ENOSPC)
			if givenUp {
				want = context.DeadlineExceeded
			}
			checkError(t, e.Swap(ctx, next), want)
			checkError(t, e.Swap(t.Context(), next), nil)
			for range 2 {
				if loss := e.Loss(); loss == nil || loss.Requests != 1 || loss.First.Op != wire.CmdFlush ||
					!errors.Is(loss, syscall.ENOSPC) {
					t.Errorf("given up %t: the loss of %v, want that of a flush", givenUp, loss)
				}
			}
		})
	}
}

// TestSwapHolds holds that nothing is executed while a new backend is being made, also of a client
// that comes meanwhile.
func TestSwapHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, next := newDisk(8192), newDisk(8192)
		e := export(t, old, server.Options{})
		s := connect(t, e)
		s.expect(0, call{op: cmdRead, length: 512})
		var late *session
		replies := make(chan reply, 2)
		err := e.SwapFunc(t.Context(), func() (backends.Backend, error) {
			old.history()
			late = connect(t, e)
			go func() { replies <- s.do(call{op: cmdWrite, data: []byte("new")}) }()
			go func() { replies <- late.do(call{op: cmdWrite, offset: 512, data: []byte("late")}) }()
			time.Sleep(time.Minute)
			if calls := append(old.history(), next.history()...); len(calls) > 0 {
				t.Errorf("calls meanwhile: %q", calls)
			}
			return next, nil
		})
		synctest.Wait()
		if err != nil || !bytes.HasPrefix(next.data, []byte("new")) ||
			!bytes.HasPrefix(next.data[512:], []byte("late")) {
			t.Errorf("error %v, the new backend begins with %q", err, next.data[:8])
		}
		for range 2 {
			if p := <-replies; p.errno != 0 {
				t.Errorf("error %d", p.errno)
			}
		}
		s.disconnect()
		late.disconnect()
	})
}
