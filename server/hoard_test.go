package server_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestHoard has clients take all the memory that there is, and keep it: who needs some gets it nevertheless, and who keeps none, or does
// not keep the server waiting, stays.
func TestHoard(t *testing.T) {
	const most = 32 << 20
	reads := append(call{op: cmdRead, length: most}.encode(1), call{op: cmdRead, length: most}.encode(2)...)
	write := call{op: cmdWrite, data: make([]byte, most)}.encode(1)[:100_000]
	plainly := func(d *disk) backends.Backend { return plain{d, backends.CapWrite} }
	directly := func(d *disk) backends.Backend { return directDisk{d} }
	tests := []struct {
		name     string
		b        func(*disk) backends.Backend
		hoarders [][]byte // what they send
	}{
		{"who takes no replies", plainly, [][]byte{reads}},
		{"who sends no payload", plainly, [][]byte{write, write}},
		{"who sends no payload, direct", directly, [][]byte{write, write}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := export(t, tt.b(newDisk(most)), server.Options{})
				d := serve(t, &server.Server{Exports: map[string]*server.Export{"": e}, MaxMemory: 2 * most})
				idle := newClient(t, d.dial(t, ""))
				idle.expect(0, call{op: cmdRead, length: 512})
				for _, sends := range tt.hoarders {
					d.dial(t, "").Write(sends)
				}
				synctest.Wait()
				needy := newClient(t, d.dial(t, ""))
				begin := time.Now()
				needy.expect(0, call{op: cmdWrite, data: make([]byte, 1<<20), flags: fua})
				if took := time.Since(begin); took < 20*time.Second || took > 45*time.Second {
					t.Errorf("it took %v", took)
				}
				begin = time.Now()
				for range 20 {
					needy.expect(0, call{op: cmdWrite, data: make([]byte, 1<<20), flags: fua})
				}
				if took := time.Since(begin); took > time.Second {
					t.Errorf("thereafter it took %v", took)
				}
				idle.expect(0, call{op: cmdRead, length: 512})
			})
		})
	}
}
