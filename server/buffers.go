package server

import (
	"math/bits"
	"sync"
)

// The smallest and the largest size class of buffers: 4 KiB and wire.MaxPayload.
const (
	minClass = 12
	maxClass = 25
)

// What requests need for a while is lent by the process, not by each export: many devices together
// take no more than is in flight, and a new one finds it warm.
var (
	payloads buffers
	requests sync.Pool // of *request; newRequest makes them
	batches  = sync.Pool{New: func() any { return &batch{pool: &payloads} }}
)

// buffers lends memory for payloads, by size class, so that a request allocates nothing once its
// class is warm. The pools keep per-processor stacks (the next request gets cache-hot memory) and
// the garbage collector takes what a peak left behind. The zero value is ready to use. Safe for
// concurrent use.
type buffers struct {
	classes [maxClass - minClass + 1]sync.Pool
}

// A buffer is borrowed memory: bytes has the length asked for and undefined contents.
type buffer struct {
	bytes []byte
}

// get lends n bytes, 0 < n <= wire.MaxPayload.
func (p *buffers) get(n int) *buffer {
	class := classOf(n)
	b, ok := p.classes[class-minClass].Get().(*buffer)
	if !ok {
		b = &buffer{bytes: make([]byte, 1<<class)}
	}
	b.bytes = b.bytes[:n]
	return b
}

// put takes back what get lent.
func (p *buffers) put(b *buffer) {
	p.classes[classOf(cap(b.bytes))-minClass].Put(b)
}

// classOf returns the binary logarithm of the smallest class that holds n bytes.
func classOf(n int) int {
	return max(minClass, bits.Len(uint(n-1)))
}
