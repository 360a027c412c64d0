package server_test

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// TestStalledClients has a thousand clients make the server wait for them with all the memory that
// they can get: an honest client is served meanwhile as if they were not there, also where it
// writes to the same bytes, and memory stays within its limit.
func TestStalledClients(t *testing.T) {
	const clients, most, memory = 1000, 32 << 20, 256 << 20
	plainly := func(d *disk) backends.Backend { return plain{d, backends.CapWrite} }
	directly := func(d *disk) backends.Backend { return directDisk{d} }
	write := call{op: cmdWrite, length: most}.encode(1)
	var reads []byte
	for cookie := range uint64(128) {
		reads = append(reads, call{op: cmdRead, length: 1 << 20}.encode(cookie)...)
	}
	for _, tt := range []struct {
		name string
		b    func(*disk) backends.Backend
		says []byte
		real bool // time: synctest takes a loop for running that waits for the outbox
	}{
		{"who announce a write and send nothing", plainly, write, false},
		{"who announce a write and send nothing, direct", directly, write, false},
		{"who take no replies", plainly, reads, false},
		{"who take no replies, direct", func(*disk) backends.Backend { return unwilling{vast(most)} }, reads, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in, settle, pause := synctest.Test, synctest.Wait, time.Second
			if tt.real {
				in, pause = func(t *testing.T, f func(*testing.T)) { f(t) }, 0
				settle = func() { <-time.After(100 * time.Millisecond) }
			}
			in(t, func(t *testing.T) {
				d := serve(t, &server.Server{Exports: map[string]*server.Export{"": export(t, tt.b(newDisk(most)),
					server.Options{})}, MaxMemory: memory})
				honest := newClient(t, d.dial(t, ""))
				for range clients {
					nc := d.dial(t, "")
					go nc.Write(tt.says)
				}
				settle()
				for range 60 { // a minute and more
					for _, q := range []call{
						{op: cmdWrite, data: make([]byte, 4096)},
						{op: cmdWrite, data: make([]byte, 4096), flags: fua},
						{op: cmdRead, length: 512},
						{op: cmdRead, length: 64 << 10},
					} {
						begin := time.Now()
						honest.expect(0, q)
						if took := time.Since(begin); took >= time.Second {
							t.Fatalf("op %d took %v", q.op, took)
						}
					}
					time.Sleep(pause)
				}
				if held := heapInUse(); held > memory+clients*(256<<10)+most {
					t.Errorf("%d MiB are in use, beside a disk of %d MiB", held>>20, most>>20)
				}
			})
		})
	}
}

// heapInUse returns how much memory is in use, in bytes.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
