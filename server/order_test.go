package server_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestSlowRequests holds that a slow request delays no other, on its own connection or on another,
// and that the bound on requests in flight is kept.
func TestSlowRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 4
		release := make(chan struct{})
		var inside atomic.Int32
		d := newDisk(1 << 20)
		d.before = func(op string, off, n int64) error {
			if off == 0 {
				inside.Add(1)
				<-release
			}
			return nil
		}
		e := export(t, d, server.Options{MaxInFlight: bound})
		s, other := connect(t, e), connect(t, e)

		slow := []<-chan reply{s.start(call{op: cmdRead, length: 512})}
		start := time.Now()
		for range 10 {
			s.expect(0, call{op: cmdRead, offset: 512, length: 512})
			s.expect(0, call{op: cmdWrite, offset: 512, data: make([]byte, 512)})
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("fast requests took %v beside a slow one", waited)
		}
		for range bound + 2 {
			ch := make(chan reply, 1)
			go func() { ch <- s.do(call{op: cmdRead, length: 512}) }()
			slow = append(slow, ch)
		}
		synctest.Wait()
		if n := inside.Load(); n != bound {
			t.Errorf("%d requests are executed at once, want %d", n, bound)
		}
		if n := s.conn.Stats().InFlight; n != bound+1 {
			t.Errorf("%d requests in flight, want %d and one that waits for a worker", n, bound)
		}
		other.expect(0, call{op: cmdRead, offset: 512, length: 512})
		close(release)
		for _, ch := range slow {
			if p := <-ch; p.errno != 0 {
				t.Errorf("a slow request got error %d", p.errno)
			}
		}
		s.disconnect()
		other.disconnect()
	})
}

// TestPayloadBound holds that large payloads wait for memory, of which there is room for two of the
// largest size.
func TestPayloadBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var inside atomic.Int32
		d := newDisk(32 << 20)
		d.before = func(op string, off, n int64) error {
			inside.Add(1)
			<-release
			return nil
		}
		s := connect(t, export(t, d, server.Options{}))
		for range 3 {
			go s.do(call{op: cmdRead, length: 32 << 20})
		}
		synctest.Wait()
		if n := inside.Load(); n != 2 {
			t.Errorf("%d reads of 32 MiB at once, want 2", n)
		}
		close(release)
		synctest.Wait()
		if st := s.conn.Stats(); st.Read.Bytes != 96<<20 {
			t.Errorf("%d bytes were read, want 96 MiB", st.Read.Bytes)
		}
		s.disconnect()
	})
}

// TestDurableBeforeReply holds that neither FLUSH nor FUA is answered while the backend still
// syncs.
func TestDurableBeforeReply(t *testing.T) {
	tests := []struct {
		name string
		op   string // that the backend is slow in
		q    call
		caps backends.Caps
	}{
		{"flush", "sync", call{op: cmdFlush}, ^backends.Caps(0)},
		{"write FUA, emulated", "sync", call{op: cmdWrite, flags: fua, data: make([]byte, 512)}, ^backends.Caps(0)},
		{"trim FUA", "sync", call{op: cmdTrim, flags: fua, length: 512}, ^backends.Caps(0)},
		{"zero FUA, emulated", "sync", call{op: cmdZero, flags: fua, length: 512}, ^backends.Caps(0)},
		{"write", "write", call{op: cmdWrite, data: make([]byte, 512)}, backends.CapWrite},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				d := newDisk(1 << 20)
				d.before = func(op string, off, n int64) error {
					if op == tt.op {
						<-release
					}
					return nil
				}
				s := connect(t, export(t, plain{d, tt.caps}, server.Options{}))
				got := s.start(tt.q)
				synctest.Wait()
				select {
				case p := <-got:
					t.Fatalf("answered before it was durable: %+v", p)
				default:
				}
				close(release)
				if p := <-got; p.errno != 0 {
					t.Errorf("error %d", p.errno)
				}
				s.disconnect()
			})
		})
	}
}

// TestDisconnectFinishes holds that NBD_CMD_DISC lets requests in flight finish, and that they are
// answered.
func TestDisconnectFinishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		d.before = func(string, int64, int64) error { time.Sleep(time.Minute); return nil }
		s := connect(t, export(t, d, server.Options{}))
		got := s.start(call{op: cmdWrite, data: []byte("written")})
		s.disconnect()
		if p := <-got; p.errno != 0 || string(d.data[:7]) != "written" {
			t.Errorf("error %d, stored %q", p.errno, d.data[:7])
		}
	})
}
