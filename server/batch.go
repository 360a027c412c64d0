package server

import (
	"os"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
	"github.com/nbdctl/nbdctl/server/metrics"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// batchReplies and batchBytes bound what is gathered before it is sent: more would leave the
	// client idle meanwhile, and fall out of the processor's cache.
	batchReplies = 500
	batchBytes   = 256 << 10
	// minHole is the length in bytes from which on zeroes of a structured reply are worth a chunk
	// of their own.
	minHole = 512
	// headerSize is the room in bytes for the headers of a reply, on average: that of a chunk of
	// data has 28, and a hole 32. With extended headers there is room for fewer.
	headerSize = 32
	// slabSize is the length in bytes of the memory for replies that have to be copied.
	slabSize = 256 << 10
	// maxPooledVec is how many pieces a batch keeps room for. Only a reply in very many pieces
	// takes more.
	maxPooledVec = 4 * batchReplies
)

// zeros is what all holes are sent from. Nothing ever writes to it.
var zeros [64 << 10]byte

// A batch gathers the replies to a burst of requests, to be sent at once. To the backend it is the
// backends.Reply of the read that is being executed. Used by one goroutine.
type batch struct {
	structured bool // READ is answered in chunks
	extended   bool // everything is, and their headers are extended ones

	vec     rawio.Vec
	headers [batchReplies * headerSize]byte
	head    int // bytes of headers in use
	replies int
	bare    bool              // the last piece ends with a header: another one belongs to the same piece
	bytes   int               // of all replies, on the wire
	ends    [batchReplies]int // bytes, behind each of them
	tally   metrics.Tally     // of the replies
	asked   [batchReplies]wire.Request

	pool *buffers
	slab *buffer // nil until something has to be copied
	used int     // bytes of it

	// pages are the data of the last reply, if they come from a file. They are held before its
	// header is sent.
	pages rawio.Pages

	canFile bool
	copies  bool    // what is given by reference
	open    opening // the reply that is being collected

	faulted []wire.Request // those of a batch that was sent, whose data were not there
}

// An opening is a reply that is not finished: what to go back to, and how much data it has got.
type opening struct {
	pieces, bytes, used, head int // the batch without it
	last                      int // how long its last piece was, if the reply began in that; else 0
	want, got                 int // data, in bytes
	wrong                     bool
	blocked                   bool // there was no room for the copies
	chunks                    chunks
}

// chunks are those of a structured reply to a READ, of which the last one is not finished.
type chunks struct {
	inUse bool
	holes bool       // zeroes may be told of instead of being sent
	size  int        // of a header, in bytes
	last  wire.Chunk // of no type: there is none yet
	at    int        // where its header is
}

// begin opens a successful reply to h with n bytes of data.
func (b *batch) begin(h *wire.Request, n int) {
	b.open = opening{pieces: len(b.vec.Bufs), bytes: b.bytes, used: b.used, head: b.head, want: n}
	if b.bare {
		b.open.last = len(b.vec.Bufs[len(b.vec.Bufs)-1])
	}
	b.replies++
	if b.extended || b.structured && h.Command == wire.CmdRead {
		b.beginChunks(h)
		return
	}
	wire.SimpleReply{Cookie: h.Cookie}.Put((*[wire.SimpleReplySize]byte)(b.header(wire.SimpleReplySize)))
}

// header adds a header of n bytes, which are to be written.
func (b *batch) header(n int) []byte {
	h := b.headers[b.head:][:n]
	b.head += n
	b.bytes += n
	if b.bare {
		b.stretch(n)
	} else {
		b.vec.Add(h)
	}
	b.bare = true
	return h
}

// stretch makes the last piece n bytes longer.
func (b *batch) stretch(n int) {
	last := &b.vec.Bufs[len(b.vec.Bufs)-1]
	*last = (*last)[:len(*last)+n]
}

// complete reports whether the reply has got exactly the data it needs.
func (b *batch) complete() bool { return !b.open.wrong && b.open.got == b.open.want }

// commit closes the reply to the request h.
func (b *batch) commit(h *wire.Request) {
	if b.open.chunks.inUse {
		b.endChunks()
	} else {
		b.bytes += b.open.got
		b.bare = b.open.want == 0
	}
	b.tally.Count(h.Command, h.Length)
	b.ends[b.replies-1] = b.bytes
	b.asked[b.replies-1] = *h
}

// rewind forgets the reply.
func (b *batch) rewind() {
	b.vec.Truncate(b.open.pieces)
	if b.bare = b.open.last > 0; b.bare {
		last := &b.vec.Bufs[len(b.vec.Bufs)-1]
		*last = (*last)[:b.open.last]
	}
	b.replies--
	b.bytes, b.used, b.head = b.open.bytes, b.open.used, b.open.head
	b.pages.Drop()
}

// full reports whether the batch should be sent before anything is added.
func (b *batch) full() bool {
	return b.replies == batchReplies || b.bytes >= batchBytes || b.pages.Len() > 0 ||
		len(b.headers)-b.head < maxHole
}

// fits reports whether a reply with n bytes of copied data does. It is true of an empty batch.
func (b *batch) fits(n int) bool { return b.slab == nil || b.used == 0 || b.used+n <= slabSize }

// grow makes n bytes of data part of the reply, unless it would be too long with them.
func (b *batch) grow(n int) bool {
	if n < 0 || n > b.open.want-b.open.got {
		b.open.wrong = true
		return false
	}
	if b.open.chunks.inUse {
		b.growData(n)
	}
	b.open.got += n
	return true
}

// Bytes implements backends.Reply.
func (b *batch) Bytes(p []byte) {
	if b.copies {
		b.copy(p)
		return
	}
	if b.grow(len(p)) {
		b.vec.Add(p)
	}
}

// copy adds a copy of p.
func (b *batch) copy(p []byte) {
	q := b.Buffer(len(p))
	if q == nil && len(p) > 0 {
		b.open.blocked = true
		return
	}
	copy(q, p)
}

// Zeros implements backends.Reply.
func (b *batch) Zeros(n int) {
	if b.open.chunks.holes && b.growHole(n) || !b.grow(n) {
		return
	}
	for n > 0 {
		p := zeros[:min(n, len(zeros))]
		b.vec.Add(p)
		n -= len(p)
	}
}

// Buffer implements backends.Reply.
func (b *batch) Buffer(n int) []byte {
	if n > slabSize-b.used || !b.grow(n) {
		return nil
	}
	if b.slab == nil {
		b.slab = b.pool.get(slabSize)
	}
	p := b.slab.bytes[b.used : b.used+n : b.used+n]
	b.used += n
	b.vec.Add(p)
	return p
}

// File implements backends.Reply.
func (b *batch) File(f *os.File, off int64, n int) bool {
	if !b.canFile || b.open.got != 0 || n != b.open.want || n == 0 || b.pages.Take(f, off, n) != nil {
		return false
	}
	return b.grow(n)
}

// reset empties the batch once it was sent.
func (b *batch) reset() {
	b.vec.Truncate(0)
	b.replies, b.bytes, b.used, b.head = 0, 0, 0, 0
	b.bare = false
	b.pages.Drop()
	b.faulted = nil
	b.tally = metrics.Tally{}
}

// release gives back what the empty batch has borrowed, before it goes back itself.
func (b *batch) release() {
	if b.slab != nil {
		b.pool.put(b.slab)
		b.slab = nil
	}
	if cap(b.vec.Bufs) > maxPooledVec {
		b.vec = rawio.Vec{}
	}
}
