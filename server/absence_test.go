package server_test

import (
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestAbsence has the client hang up while the backend takes five seconds: the connection tells for
// how long it may not have seen that.
func TestAbsence(t *testing.T) {
	const slow = 5 * time.Second
	read, write := call{op: cmdRead, length: 512}, call{op: cmdWrite, data: make([]byte, 512)}
	for _, tt := range []struct {
		name  string
		fast  bool
		fails error
		calls []call
		limit int
		want  time.Duration
	}{
		{name: "in the loop", fast: true, calls: []call{read}, want: slow},
		{name: "in the loop, and fails", fast: true, fails: syscall.EIO, calls: []call{read}, want: slow},
		{name: "on a worker", calls: []call{write}},
		{name: "on a worker, and another one has no place", calls: []call{write, write}, limit: 1, want: slow},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				d.before = func(string, int64, int64) error {
					time.Sleep(slow)
					return tt.fails
				}
				var b backends.Backend = plain{d, backends.CapWrite}
				if tt.fast {
					b = directDisk{d}
				}
				s := connect(t, export(t, b, server.Options{MaxInFlight: tt.limit}))
				for _, q := range tt.calls {
					s.start(q)
				}
				synctest.Wait()
				s.nc.Close()
				<-s.err
				if got := s.conn.Absence(); got != tt.want {
					t.Errorf("%v, want %v", got, tt.want)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		d.before = func(_ string, off, _ int64) error {
			if off == 0 {
				time.Sleep(slow)
			}
			return nil
		}
		s := connect(t, export(t, directDisk{d}, server.Options{}))
		s.expect(0, read)
		s.expect(0, call{op: cmdRead, offset: 512, length: 512})
		s.disconnect()
		if got := s.conn.Absence(); got != 0 {
			t.Errorf("%v, although the client was seen since", got)
		}
	})
}
