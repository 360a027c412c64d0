package nbd

import (
	"sync"
	"sync/atomic"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A call is a request, from when its caller has it sent until the reply is there. A connection has
// a fixed number of them, which are used again and again: one for each request in flight.
//
// Its owner is the caller, until the request is sent; then the reader of the connection, which
// gives it back with done. A caller that gives up leaves it to the reader for good.
type call struct {
	// cookie is that of the request in flight; 0: there is none. What the reader may know of a call
	// was written before it.
	cookie atomic.Uint64
	index  uint64 // among the calls of the connection
	used   uint64 // how many requests it was; part of the cookie, so that a late reply is nobody's

	request wire.Request
	data    []byte  // of a READ: to be filled. Of a WRITE: to be sent
	status  *status // of a BLOCK_STATUS

	// parts are what has to be over before the caller is told: the reply is there, and the data of
	// a WRITE, which are the caller's, were sent.
	parts atomic.Int32
	done  chan struct{} // has a value then

	// The result: guarded by cookie, and after done the caller's.
	covered cover // which bytes of a READ are there
	failure *RequestError
	err     error // that of the connection

	mu      sync.Mutex // guards those below; only where the caller can give up
	patient bool       // the caller can't, and mu is not used
	gone    bool       // the caller has
	filling bool       // the reader is at work on data
	filled  sync.Cond  // that it is not any more
}

// finish is called when a part is over.
func (c *call) finish() {
	if c.parts.Add(-1) == 0 {
		c.done <- struct{}{}
	}
}

// claim has the reader work on data, unless the caller has gone.
func (c *call) claim() bool {
	if c.patient {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.filling = !c.gone
	return c.filling
}

// release ends what claim has begun.
func (c *call) release() {
	if c.patient {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.filling = false
	c.filled.Broadcast()
}

// abandon is called by a caller that gives up. The data are its own again afterwards. interrupt has
// the reader look up if it waits for the network.
func (c *call) abandon(interrupt func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for c.filling {
		interrupt()
		c.filled.Wait()
	}
}
