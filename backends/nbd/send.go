package nbd

import (
	"net"
	"runtime"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// maxCopied is how long data of a WRITE are that go behind the header of their request. What is
	// longer is sent from where it is.
	maxCopied = 8 << 10
	// keptBatch bounds the memory that a batch keeps for the next one.
	keptBatch = 256 << 10
)

// A batch is what is sent at once: the requests of several callers.
type batch struct {
	bytes  []byte      // headers, and short data
	begun  int         // where those begin that are not in pieces yet
	pieces net.Buffers // unless it is empty, all that there is before begun
	rest   net.Buffers // of them, while they are sent
	refs   []*call     // whose data are in pieces
}

func (b *batch) empty() bool { return len(b.bytes) == 0 }

// refers reports whether the data of a call are sent from where they are.
func (k *conn) refers(c *call) bool {
	return c.request.Command == wire.CmdWrite && !k.copies && len(c.data) > maxCopied
}

// add appends a request, with the data that follow it if it is a WRITE, or with a reference to
// them.
func (b *batch) add(c *call, extended, refers bool) {
	if extended {
		b.bytes = c.request.AppendExtended(b.bytes)
	} else {
		b.bytes = c.request.Append(b.bytes)
	}
	switch {
	case c.request.Command != wire.CmdWrite:
		return
	case !refers:
		b.bytes = append(b.bytes, c.data...)
		return
	}
	b.pieces = append(b.pieces, b.bytes[b.begun:], c.data)
	b.begun = len(b.bytes)
	b.refs = append(b.refs, c)
}

// send writes the batch, and empties it in any case.
func (b *batch) send(nc net.Conn) error {
	var err error
	if len(b.pieces) == 0 {
		_, err = nc.Write(b.bytes)
	} else {
		if b.begun < len(b.bytes) {
			b.pieces = append(b.pieces, b.bytes[b.begun:])
		}
		b.rest = b.pieces
		_, err = b.rest.WriteTo(nc)
		b.rest = nil
		clear(b.pieces)
	}
	for i, c := range b.refs {
		c.finish()
		b.refs[i] = nil
	}
	b.refs, b.pieces, b.begun, b.bytes = b.refs[:0], b.pieces[:0], 0, b.bytes[:0]
	if cap(b.bytes) > keptBatch {
		b.bytes = nil
	}
	return err
}

// start sends a request. Callers that come while one of them sends leave their requests to it, so
// that a system call is made for all of them.
func (k *conn) start(c *call) {
	c.used++
	c.request.Cookie = c.used<<cookieShift | c.index
	k.sending.Lock()
	if k.err != nil {
		c.err = k.err
		k.sending.Unlock()
		c.parts.Store(1)
		c.finish()
		return
	}
	// The call is the reader's when its cookie is there, and who sends it may not be us.
	refers := k.refers(c)
	c.parts.Store(1)
	if refers {
		c.parts.Store(2)
	}
	c.cookie.Store(c.request.Cookie)
	k.next.add(c, k.Extended, refers)
	if k.busy {
		k.sending.Unlock()
		return
	}
	k.busy = true
	if !c.patient { // A caller that can give up must not wait for the network.
		k.help <- struct{}{}
		k.sending.Unlock()
		return
	}
	k.sending.Unlock()
	if k.inFlight.Load() > 1 {
		runtime.Gosched() // Others that can run may have something to send, too.
	}
	k.flush(c)
}

// flush sends what there is to send until there is nothing more, or c, which may be nil, is done:
// then its caller has something better to do, and the helper goes on.
func (k *conn) flush(c *call) {
	for {
		k.sending.Lock()
		if k.next.empty() || k.err != nil {
			k.rest()
			k.drop()
			k.sending.Unlock()
			return
		}
		if c != nil && len(c.done) > 0 {
			k.help <- struct{}{} // There is room for one, and only who is busy says so.
			k.sending.Unlock()
			return
		}
		b := k.next
		k.next, k.spare = k.spare, nil
		k.sending.Unlock()
		if err := b.send(k.NetConn); err != nil {
			k.fail(err)
		}
		k.heard.Add(1)
		k.sending.Lock()
		k.spare = b
		k.sending.Unlock()
	}
}

// rest is called by who is busy, and is not any more. The caller holds sending.
func (k *conn) rest() {
	k.busy = false
	if k.rested != nil {
		close(k.rested)
		k.rested = nil
	}
}

// drop lets go of what is not going to be sent any more. The caller holds sending.
func (k *conn) drop() {
	if k.err == nil {
		return
	}
	for _, c := range k.next.refs {
		c.finish()
	}
	*k.next = batch{}
}

// helper sends for callers that have gone on.
func (k *conn) helper() {
	defer k.running.Done()
	for {
		select {
		case <-k.help:
			k.flush(nil)
		case <-k.dead:
			// Somebody may have left it to the helper just before, and nobody does later.
			select {
			case <-k.help:
				k.flush(nil)
			default:
				return
			}
		}
	}
}
