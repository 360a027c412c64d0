package server

import "testing"

// BenchmarkBatch gathers a reply of 4 KiB by reference, and publishes and empties the batch when it is full.
func BenchmarkBatch(b *testing.B) {
	var pool buffers
	var sum counters
	data := make([]byte, 4096)
	batch := &batch{pool: &pool}
	h := header{op: OpRead, length: 4096}
	b.ReportAllocs()
	for b.Loop() {
		batch.begin(1, len(data))
		batch.Bytes(data)
		batch.commit(&h)
		if batch.full() {
			sum.publish(&batch.tally, 1000)
			batch.reset()
		}
	}
}
