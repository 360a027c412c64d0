package server

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
)

// An outbox is the sending side of a connection. Replies go out in the order in which requests
// finish, each header and its data in one piece. After an error nothing more is sent: the stream
// may have ended in the middle of a reply.
//
// Whoever sends also sends what others have finished meanwhile, so that a worker never waits for
// another one's system call, and replies coalesce as the load grows.
type outbox struct {
	io     rawio.Conn
	broken func() // called once, at the first error
	ledger ledger

	sending sync.Mutex // held while something is sent; guards the two below
	err     error
	vec     rawio.Vec // of sendFinished

	mu          sync.Mutex // guards the two below
	first, last *request   // the queue of finished requests
}

// flush sends a batch. It blocks while the client takes no data.
func (o *outbox) flush(b *batch) error {
	o.sending.Lock()
	if n := o.send(&b.vec, b.pages.Len() > 0); n >= 0 {
		o.resend(b, n)
	}
	if b.pages.Len() > 0 && o.err == nil {
		o.check(o.io.SendPages(&b.pages))
	}
	err := o.err
	o.sending.Unlock()
	o.sendFinished()
	return err
}

// reply sends the reply to a finished request, which it lets go of, or leaves that to who is
// sending now.
func (o *outbox) reply(r *request) {
	o.mu.Lock()
	if o.last == nil {
		o.first = r
	} else {
		o.last.next = r
	}
	o.last = r
	o.mu.Unlock()
	o.sendFinished()
}

// sendFinished sends what is in the queue, unless somebody else is sending: who is comes here
// afterwards. Nothing is left behind, because the queue is looked at once more when the lock is
// free.
func (o *outbox) sendFinished() {
	for !o.empty() && o.sending.TryLock() {
		for r := o.dequeue(); r != nil; r = o.dequeue() {
			o.sendQueue(r)
		}
		o.sending.Unlock()
	}
}

// sendQueue sends the replies to r and those behind it, in messages of about batchBytes. The caller
// holds sending.
func (o *outbox) sendQueue(r *request) {
	for r != nil {
		first, bytes := r, 0
		for ; r != nil && bytes < batchBytes && len(o.vec.Bufs) < 2*maxCombined; r = r.next {
			o.vec.Add(r.head)
			o.vec.Add(r.data)
			bytes += len(r.head) + len(r.data)
		}
		o.send(&o.vec, false)
		o.vec.Truncate(0)
		for first != r {
			next := first.next
			first.release()
			first = next
		}
	}
}

// maxCombined is how many replies of workers are sent at once. It bounds what the outbox of an idle
// connection occupies.
const maxCombined = 64

// send sends v, unless sending has failed before. It returns -1, or how many bytes were sent before
// it met memory that is not there, which is no failure. The caller holds sending.
func (o *outbox) send(v *rawio.Vec, more bool) int {
	if o.err != nil {
		return -1
	}
	n, err := o.io.Send(v, more)
	if errors.Is(err, syscall.EFAULT) && n >= 0 {
		return n
	}
	o.check(err)
	return -1
}

// check remembers an error of sending. The caller holds sending.
func (o *outbox) check(err error) {
	if err != nil {
		o.err = fmt.Errorf("send reply: %w", err)
		o.ledger.begin() // It has no end: the stream may be in the middle of a reply.
		o.broken()
	}
}

func (o *outbox) empty() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.first == nil
}

// dequeue takes the whole queue.
func (o *outbox) dequeue() *request {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.first
	o.first, o.last = nil, nil
	return r
}

// failure returns the error that broke the sending side, if any.
func (o *outbox) failure() error {
	o.sending.Lock()
	defer o.sending.Unlock()
	return o.err
}
