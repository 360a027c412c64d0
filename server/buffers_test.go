package server

import (
	"testing"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestBuffers(t *testing.T) {
	tests := []struct{ n, capacity int }{
		{1, 4 << 10},
		{4 << 10, 4 << 10},
		{4<<10 + 1, 8 << 10},
		{64 << 10, 64 << 10},
		{1<<20 - 1, 1 << 20},
		{wire.MaxPayload, wire.MaxPayload},
	}
	var pool buffers
	for _, tt := range tests {
		for range 2 { // fresh, and out of the pool
			b := pool.get(tt.n)
			if len(b.bytes) != tt.n || cap(b.bytes) != tt.capacity {
				t.Errorf("get(%d): %d bytes of %d, want capacity %d", tt.n, len(b.bytes), cap(b.bytes), tt.capacity)
			}
			pool.put(b)
		}
	}
}
