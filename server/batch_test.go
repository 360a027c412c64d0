package server

import (
	"bytes"
	"testing"

	"github.com/nbdctl/nbdctl/server/metrics"
	"github.com/nbdctl/nbdctl/server/wire"
)

// BenchmarkBatch gathers a reply of 4 KiB by reference, and publishes and empties the batch when it
// is full.
func BenchmarkBatch(b *testing.B) {
	var pool buffers
	var sum metrics.Counters
	data := make([]byte, 4096)
	batch := &batch{pool: &pool}
	h := wire.Request{Command: wire.CmdRead, Length: 4096}
	b.ReportAllocs()
	for b.Loop() {
		batch.begin(&h, len(data))
		batch.Bytes(data)
		batch.commit(&h)
		if batch.full() {
			sum.Publish(&batch.tally, 1000)
			batch.reset()
		}
	}
}

// TestBatchBare has replies without data go out in one piece, whatever was begun and given up
// between them.
func TestBatchBare(t *testing.T) {
	b := new(batch)
	var want []byte
	reply := func(cookie uint64, data string) {
		b.begin(&wire.Request{Command: wire.CmdWrite, Cookie: cookie}, len(data))
		var h [wire.SimpleReplySize]byte
		wire.SimpleReply{Cookie: cookie}.Put(&h)
		want = append(append(want, h[:]...), data...)
		if data != "" {
			b.Bytes([]byte(data))
		}
		if !b.complete() {
			t.Errorf("reply %d is not complete", cookie)
		}
		b.commit(&wire.Request{Command: wire.CmdWrite, Cookie: cookie})
	}
	for round := range 2 {
		want = nil
		reply(1, "")
		reply(2, "")
		b.begin(&wire.Request{Cookie: 3}, 4)
		b.Bytes([]byte("dat"))
		b.rewind()
		reply(4, "")
		b.begin(&wire.Request{Cookie: 5}, 4)
		b.rewind()
		reply(6, "data")
		reply(7, "")
		reply(8, "")
		if got := bytes.Join(b.vec.Bufs, nil); !bytes.Equal(got, want) || b.bytes != len(want) || b.replies != 6 {
			t.Errorf("round %d: %d replies in %d bytes, %x, want 6 in %d, %x",
				round, b.replies, b.bytes, got, len(want), want)
		}
		// 1, 2, 4 and the header of 6; its data; 7 and 8.
		if n := len(b.vec.Bufs); n != 3 {
			t.Errorf("round %d: %d pieces, want 3", round, n)
		}
		b.reset()
	}
}

func BenchmarkClock(b *testing.B) {
	for b.Loop() {
		clock()
	}
}
