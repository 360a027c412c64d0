package server

import (
	"fmt"
	"net"
	"sync"
)

// An outbox is the sending side of a connection. Replies go out in the order in which requests finish, each header and its data
// in one piece. After an error nothing more is sent: the stream may have ended in the middle of a reply.
type outbox struct {
	nc     net.Conn
	broken func() // called once, at the first error

	mu     sync.Mutex // held for a whole reply; guards all below
	err    error
	header [replySize]byte
	parts  [2][]byte   // what vec points to, so that a reply allocates nothing
	vec    net.Buffers // becomes one writev
}

// send sends a simple reply, with data if code is 0 and the request was a READ. It blocks while the client takes no data.
func (o *outbox) send(code errno, cookie uint64, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return
	}
	putReply(&o.header, code, cookie)
	o.parts = [2][]byte{o.header[:], data}
	o.vec = o.parts[:]
	if len(data) == 0 {
		o.vec = o.parts[:1]
	}
	_, err := o.vec.WriteTo(o.nc)
	o.parts = [2][]byte{}
	if err != nil {
		o.err = fmt.Errorf("send reply: %w", err)
		o.broken()
	}
}

// failure returns the error that broke the sending side, if any.
func (o *outbox) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}
