package server_test

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/server"
)

// TestCloseBeginsNothing closes a connection in the middle of a burst of writes: those that were
// received and not begun are not executed, for their client may have sent them again, and newer
// ones behind them, over another connection.
func TestCloseBeginsNothing(t *testing.T) {
	for _, character := range characters {
		if character.name == "workers" {
			continue // These have begun all of them.
		}
		t.Run(character.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8192)
				e := character.export(t, d)
				var conn atomic.Pointer[server.Conn]
				var written []int64
				d.before = func(_ string, off, _ int64) error {
					written = append(written, off)
					return conn.Load().Close()
				}
				var calls []call
				for i := range uint64(4) {
					calls = append(calls, call{op: cmdWrite, offset: i * 512, data: make([]byte, 512)})
				}
				stream, _ := encodeScript(calls)
				ours, theirs := net.Pipe()
				defer ours.Close()
				go io.Copy(io.Discard, ours)
				c := e.NewConn(theirs, stream) // all of it was received
				conn.Store(c)
				if err := c.Transmit(); !errors.Is(err, net.ErrClosed) {
					t.Errorf("it ended with %v", err)
				}
				if !slices.Equal(written, []int64{0}) {
					t.Errorf("written was at %d", written)
				}
			})
		})
	}
}
