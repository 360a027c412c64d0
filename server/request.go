package server

import (
	"errors"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/internal/admit"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A request is one NBD request that does not belong to a batch, between its arrival and its reply:
// a worker executes it, or the connection's goroutine does on its own. Requests are pooled by the
// export.
type request struct {
	wire.Request
	conn    *Conn
	err     error          // the outcome, if there is nothing left to be executed: refused, or failed in a batch
	payload *buffer        // data of a WRITE, room for those of a READ; nil where there are none
	cost    int64          // what the limits count it for, in bytes
	inline  bool           // executed by the connection's goroutine
	chosen  contextSet     // of which a NBD_CMD_BLOCK_STATUS tells
	hole    bool           // the answer to a READ is that there are zeroes
	lock    rangelock.Lock // what it changes
	arrived time.Duration

	judged   resend.Request // guarded by the mu of the flight
	lost     bool           // its connection has died; guarded by the mu of the flight
	overdue  bool           // it was answered without the backend; guarded by the mu of the flight
	answered atomic.Bool    // by whoever has set it: finish, or somebody who does not wait for the backend any more

	older, newer *request // in the flight of the connection
	ticket       admit.Ticket

	// The reply, for the outbox: what comes before the data, and the data.
	head  []byte
	data  []byte
	next  *request
	space [replySpace]byte // for head

	zeroes int64 // of a READ, as far as its extents have been looked at

	// run is r.serve, and look is r.sees, made once: a method value that is made where it is used
	// would be an allocation.
	run  func()
	look func(backends.Extent) bool
}

func newRequest() *request {
	r := new(request)
	r.run, r.look = r.serve, r.sees
	return r
}

// replySpace is room in bytes for what comes before the data of a reply. Only an error with a text
// is longer.
const replySpace = wire.ExtendedChunkSize + wire.HoleSize

// cost returns the payload memory that a request may take, in bytes, of a client that has chosen so
// many meta contexts. The lengths of TRIM and WRITE_ZEROES are ranges, not payload; zeros are
// written in pieces.
func cost(h *wire.Request, contexts int) int64 {
	switch h.Command {
	case wire.CmdRead, wire.CmdWrite:
		return payloadCost(h.Length)
	case wire.CmdWriteZeroes:
		return int64(min(h.Length, zeroPiece))
	case wire.CmdBlockStatus:
		return payloadCost(uint64(contexts) * statusSize)
	default:
		return 0
	}
}

// payloadCost returns the memory that a payload of n bytes takes.
func payloadCost(n uint64) int64 {
	if n == 0 {
		return 0
	}
	return 1 << classOf(int(min(n, wire.MaxPayload)))
}

// serve executes the request and answers it, whatever the backend does: a panic is caught, and the
// deferred call also runs when the backend ends the goroutine. A fault in the backend's memory is a
// panic like any other.
func (r *request) serve() {
	debug.SetPanicOnFault(true)
	err := errNoReturn
	defer func() {
		if p := recover(); p != nil {
			err = &panicError{value: p, stack: debug.Stack()}
		}
		r.finish(err)
	}()
	err = r.perform()
}

func (r *request) perform() error {
	if r.err != nil {
		return r.err
	}
	e := r.conn.export
	if r.Command == wire.CmdBlockStatus {
		return r.status()
	}
	if !r.inline && e.judge.Active() {
		if err := e.admit(r); err != nil {
			return err
		}
	}
	if r.lock.Held() && !r.inline {
		if err := e.locks.Wait(&r.lock); err != nil {
			return err
		}
	}
	var p []byte
	if r.Command == wire.CmdRead && !r.inline && r.tellsHole() {
		r.hole = true
		return nil
	}
	if r.Command == wire.CmdRead && r.Length > 0 {
		r.payload = payloads.get(int(r.Length))
	}
	if r.payload != nil {
		p = r.payload.bytes
	}
	pace := e.pace(&r.Request)
	if pace == nil {
		return e.execute(r.conn.ctx, r.Request, p)
	}
	if r.inline {
		m := &r.conn.loop.meter
		m.Begin(pace)
		defer func() {
			m.End(pace, paceBytes(r.Request))
			m.Settle(clock()) // What follows is not the backend's.
		}()
		return e.execute(r.conn.ctx, r.Request, p)
	}
	pace.Enter()
	defer pace.Leave()
	start := clock()
	err := e.execute(r.conn.ctx, r.Request, p)
	pace.Worked(clock()-start, paceBytes(r.Request))
	return err
}

// tellsHole reports whether a READ is of nothing but zeroes, of which the client can be told. The
// backend is not asked on the goroutine of the connection, for to know may take a disk.
func (r *request) tellsHole() bool {
	dev := &r.conn.export.dev
	extenter := dev.Extenter
	// Who can give up waits for a network, where to ask takes as long as to read.
	if extenter == nil || dev.ReadContext != nil || !r.conn.agreed.Structured || r.Flags&wire.CmdFlagDF != 0 || r.Length < minHole {
		return false
	}
	err := extenter.Extents(int64(r.Offset), int64(r.Length), r.look)
	return err == nil && r.zeroes == int64(r.Length)
}

// sees looks at an extent, and reports whether those before it have been zeroes.
func (r *request) sees(e backends.Extent) bool {
	if e.Zero {
		r.zeroes += e.Length
	}
	return e.Zero
}

// finish counts the request and hands its reply to the outbox. r must not be used afterwards.
func (r *request) finish(err error) {
	c := r.conn
	c.export.locks.Remove(&r.lock)
	took := clock() - r.arrived
	if r.inline {
		c.loop.absence = took
	}
	if r.answered.Swap(true) {
		r.release()
		return
	}
	code := wire.ErrnoNone
	if err != nil {
		code = c.fail(r.Request, err, took)
	} else {
		c.export.noteSlow(r.Request, took)
	}
	c.counters.Count(r.Command, r.Length, err != nil, took)
	r.encode(code, err)
	if c.account != nil && r.cost > 0 {
		c.account.Ready(&r.ticket)
	}
	c.outbox.reply(r)
}

// release gives everything back once the reply was sent.
func (r *request) release() {
	c, cost := r.conn, r.cost
	r.ticket.Taken()
	c.flight.remove(r)
	if r.payload != nil {
		payloads.put(r.payload)
	}
	*r = request{run: r.run, look: r.look}
	requests.Put(r)
	c.exit(cost)
	if c.export.judge.Active() {
		c.export.admission.wake()
	}
}

// status has the backend tell what is in the range. The answer is the payload, of a chunk for each
// context.
func (r *request) status() error {
	agreed := &r.conn.agreed
	// What is variable of a chunk is no longer than the longest payload ("Block size constraints").
	size := uint64(wire.StatusSize)
	if agreed.Extended {
		size = wire.StatusExtSize
	}
	most := int(max(1, min(maxExtents, r.conn.export.maxLength/size)))
	if r.Flags&wire.CmdFlagReqOne != 0 {
		most = 1
	}
	r.payload = payloads.get(len(agreed.Contexts) * statusSize)
	reply := r.payload.bytes[:0]
	left := r.chosen & (1<<len(agreed.Contexts) - 1)
	for i, c := range agreed.Contexts {
		if left&(1<<i) == 0 {
			continue
		}
		left &^= 1 << i
		chunk := wire.Chunk{Type: statusChunk(agreed.Extended), Cookie: r.Cookie, Offset: r.Offset}
		if left == 0 {
			chunk.Flags = wire.ChunkDone
		}
		header := len(appendChunk(reply[len(reply):], &chunk, agreed.Extended))
		room := reply[len(reply)+header : len(reply)+header : cap(reply)]
		s := statuses{id: c.ID, b: room, extended: agreed.Extended, left: most}
		if err := r.conn.export.status(&s, c.Name, int64(r.Offset), int64(r.Length)); err != nil {
			return err
		}
		chunk.Length = uint64(len(s.b))
		reply = appendChunk(reply, &chunk, agreed.Extended)[:len(reply)+header+len(s.b)]
	}
	r.payload.bytes = reply
	return nil
}

// encode makes the reply, which tells that number if err is not nil.
func (r *request) encode(code wire.Errno, err error) {
	agreed := &r.conn.agreed
	carriesData := r.Command == wire.CmdRead || r.Command == wire.CmdBlockStatus
	if err == nil && r.payload != nil && carriesData {
		r.data = r.payload.bytes
	}
	if err == nil && r.Command == wire.CmdBlockStatus {
		return // It has its headers.
	}
	if !agreed.Extended && !(carriesData && agreed.Structured) {
		r.head = r.space[:wire.SimpleReplySize]
		wire.SimpleReply{Errno: code, Cookie: r.Cookie}.Put((*[wire.SimpleReplySize]byte)(r.head))
		return
	}
	chunk := wire.Chunk{Flags: wire.ChunkDone, Cookie: r.Cookie, Offset: r.Offset, Length: uint64(len(r.data))}
	switch {
	case err != nil:
		chunk.Type = wire.ChunkError
		payload := wire.AppendError(nil, code, errorText(err))
		var part *partialError
		if r.Command == wire.CmdRead && errors.As(err, &part) && part.n > 0 && uint64(part.n) < r.Length {
			chunk.Type = wire.ChunkErrorOffset
			payload = wire.AppendErrorOffset(nil, code, errorText(err), r.Offset+uint64(part.n))
		}
		chunk.Length = uint64(len(payload))
		r.head = append(appendChunk(r.space[:0], &chunk, agreed.Extended), payload...)
	case r.hole:
		chunk.Type, chunk.Length = wire.ChunkOffsetHole, wire.HoleSize
		r.head = wire.AppendHole(appendChunk(r.space[:0], &chunk, agreed.Extended), r.Offset, uint32(r.Length))
	case r.Command == wire.CmdRead && r.Length > 0:
		chunk.Type = wire.ChunkOffsetData
		chunk.Length += wire.ChunkOffsetSize
		r.head = wire.AppendOffset(appendChunk(r.space[:0], &chunk, agreed.Extended), r.Offset)
	default:
		chunk.Type = wire.ChunkNone
		r.head = appendChunk(r.space[:0], &chunk, agreed.Extended)
	}
}

// errorText returns what a client is told of a failure beside the number. What the backend says may
// tell more of the host than is for strangers.
func errorText(err error) string {
	if r, ok := err.(*refusal); ok {
		return r.reason
	}
	return ""
}
