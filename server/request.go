package server

import "runtime/debug"

// A request is one NBD request between its arrival and its reply. Requests are pooled by the export.
type request struct {
	header
	conn    *Conn
	refused *refusal // nil: to be executed
	payload *buffer  // data of a WRITE, room for those of a READ; nil where there are none
	cost    int64    // what the gate counts it for, in bytes

	// run is r.serve, made once: a method value made at each go statement would be an allocation.
	run func()
}

func newRequest() *request {
	r := new(request)
	r.run = r.serve
	return r
}

// cost returns the payload memory that a request may need, in bytes. The lengths of TRIM and WRITE_ZEROES are ranges, not
// payload; zeros are written in pieces.
func cost(h header) int64 {
	switch h.op {
	case OpRead, OpWrite:
		return min(int64(h.length), maxPayload)
	case OpWriteZeroes:
		return min(int64(h.length), zeroPiece)
	default:
		return 0
	}
}

// serve executes the request and answers it, whatever the backend does: a panic is caught, and the deferred call also runs when
// the backend ends the goroutine.
func (r *request) serve() {
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
	if r.refused != nil {
		return r.refused
	}
	var p []byte
	if r.op == OpRead && r.length > 0 {
		r.payload = r.conn.export.buffers.get(int(r.length))
	}
	if r.payload != nil {
		p = r.payload.bytes
	}
	return r.conn.export.execute(r.header, p)
}

// finish counts the request, answers it, and gives everything back. r must not be used afterwards.
func (r *request) finish(err error) {
	c, e := r.conn, r.conn.export
	code := errnoNone
	if err != nil {
		code = e.fail(r.header, err)
	}
	c.counters.count(r.header, err != nil)

	var data []byte
	if err == nil && r.op == OpRead && r.payload != nil {
		data = r.payload.bytes
	}
	c.outbox.send(code, r.cookie, data)

	if r.payload != nil {
		e.buffers.put(r.payload)
	}
	cost := r.cost
	*r = request{run: r.run}
	e.requests.Put(r)
	c.gate.leave(cost)
}
