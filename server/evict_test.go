package server_test

import (
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestEvict has clients take all the memory that there is, and keep it: who needs some gets it
// nevertheless, and who keeps none, or does not keep the server waiting, stays.
func TestEvict(t *testing.T) {
	const most = 32 << 20
	reads := append(call{op: cmdRead, length: most}.encode(1), call{op: cmdRead, length: most}.encode(2)...)
	write := call{op: cmdWrite, data: make([]byte, most)}.encode(1)
	send := func(b []byte) func(net.Conn) { return func(nc net.Conn) { nc.Write(b) } }
	plainly := func(d *disk) backends.Backend { return plain{d, backends.CapWrite} }
	directly := func(d *disk) backends.Backend { return directDisk{d} }
	tests := []struct {
		name     string
		b        func(*disk) backends.Backend
		stallers []func(net.Conn)
	}{
		{"who takes no replies", plainly, []func(net.Conn){send(reads)}},
		{"who takes replies by the byte", plainly, []func(net.Conn){func(nc net.Conn) {
			nc.Write(reads)
			for err := error(nil); err == nil; time.Sleep(time.Second) {
				_, err = io.ReadFull(nc, make([]byte, 1))
			}
		}}},
		{"who sends no payload", plainly, []func(net.Conn){send(write[:100_000]), send(write[:100_000])}},
		{"who sends no payload, direct", directly, []func(net.Conn){send(write[:100_000]), send(write[:100_000])}},
		{"who sends a payload by the byte", plainly, []func(net.Conn){send(write[:100_000]), func(nc net.Conn) {
			nc.Write(write[:100_000])
			for err := error(nil); err == nil; time.Sleep(time.Second) {
				_, err = nc.Write(write[:1])
			}
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := serve(t, &server.Server{Exports: map[string]*server.Export{
					"":      export(t, tt.b(newDisk(most)), server.Options{}),
					"other": export(t, tt.b(newDisk(most)), server.Options{}),
				}, MaxMemory: 4 * most})
				idle := newClient(t, d.dial(t, ""))
				idle.expect(0, call{op: cmdRead, length: 512})
				var stalling sync.WaitGroup
				for _, h := range tt.stallers {
					nc := d.dial(t, "")
					stalling.Go(func() { h(nc) })
				}
				synctest.Wait()
				large := call{op: cmdWrite, data: make([]byte, 1<<20), flags: fua}
				needy := newClient(t, d.dial(t, ""))
				begin := time.Now()
				newClient(t, d.dial(t, "other")).expect(0, large)
				if took := time.Since(begin); took > time.Second {
					t.Errorf("of another export it took %v", took)
				}
				needy.expect(0, large)
				if took := time.Since(begin); took < 20*time.Second || took > 30*time.Second {
					t.Errorf("it took %v", took)
				}
				begin = time.Now()
				for range 20 {
					needy.expect(0, large)
				}
				if took := time.Since(begin); took > time.Second {
					t.Errorf("thereafter it took %v", took)
				}
				idle.expect(0, call{op: cmdRead, length: 512})
				stalling.Wait() // Those who go on do so until they are cut.
			})
		})
	}
}
