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
	vec     rawio.Vec
	headers [batchReplies * wire.SimpleReplySize]byte
	replies int           // headers in use
	bare    bool          // the last reply has no data: the header behind it belongs to the same piece
	bytes   int           // of all replies
	tally   metrics.Tally // of the replies
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
	pieces, bytes, used int // the batch without it
	joined              bool
	want, got           int // data, in bytes
	wrong               bool
	blocked             bool // there was no room for the copies
}

// begin opens a successful reply with n bytes of data.
func (b *batch) begin(cookie uint64, n int) {
	b.open = opening{pieces: len(b.vec.Bufs), bytes: b.bytes, used: b.used, joined: b.bare, want: n}
	h := b.headers[b.replies*wire.SimpleReplySize:][:wire.SimpleReplySize]
	b.replies++
	wire.SimpleReply{Cookie: cookie}.Put((*[wire.SimpleReplySize]byte)(h))
	if b.bare {
		b.stretch(wire.SimpleReplySize)
	} else {
		b.vec.Add(h)
	}
	b.bytes += wire.SimpleReplySize
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
	b.bytes += b.open.got
	b.bare = b.open.want == 0
	b.tally.Count(h.Command, h.Length)
	b.asked[b.replies-1] = *h
}

// rewind forgets the reply.
func (b *batch) rewind() {
	b.vec.Truncate(b.open.pieces)
	if b.open.joined {
		b.stretch(-wire.SimpleReplySize)
	}
	b.replies--
	b.bytes, b.used = b.open.bytes, b.open.used
	b.pages.Drop()
}

// full reports whether the batch should be sent before anything is added.
func (b *batch) full() bool {
	return b.replies == batchReplies || b.bytes >= batchBytes || b.pages.Len() > 0
}

// fits reports whether a reply with n bytes of copied data does. It is true of an empty batch.
func (b *batch) fits(n int) bool { return b.slab == nil || b.used == 0 || b.used+n <= slabSize }

// grow makes n bytes part of the reply, unless it would be too long with them.
func (b *batch) grow(n int) bool {
	if n < 0 || n > b.open.want-b.open.got {
		b.open.wrong = true
		return false
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
	if !b.grow(n) {
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
	b.open.got = n
	return true
}

// reset empties the batch once it was sent.
func (b *batch) reset() {
	b.vec.Truncate(0)
	b.replies, b.bytes, b.used = 0, 0, 0
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
