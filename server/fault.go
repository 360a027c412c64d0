package server

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A backend gives memory by reference (backends.Reply.Bytes), and the kernel reads that when the
// replies are sent. Where a file below a mapping was truncated, or its disk fails, sendmsg(2) fails
// with EFAULT then. It copies tens of kilobytes at a time, or nothing of them, so most often no
// byte of the reply was sent: then the request is answered with an error. If one was, the header
// among them, the connection is lost; that happens once for an export, because from then on what it
// gives is copied before the header is sent.

// errFault is why a request has failed then.
var errFault = fmt.Errorf("the backend's memory for the reply is not there: %w", syscall.EFAULT)

// resend sends what is left of a batch after its first bytes, reply by reply, and puts aside those
// whose data are not there. The caller holds sending.
func (o *outbox) resend(b *batch, sent int) {
	end := 0
	for i, h := range b.asked[:b.replies] {
		begin := end
		end = b.ends[i]
		if i == b.replies-1 {
			end -= b.pages.Len() // They come behind.
		}
		if end <= sent {
			continue
		}
		first := max(begin, sent)
		v := b.vec.Part(first, end)
		n := o.send(&v, b.pages.Len() > 0)
		switch {
		case n >= 0 && first+n == begin:
			b.faulted = append(b.faulted, h)
		case n >= 0:
			o.check(errFault)
		}
		if o.err != nil {
			return
		}
	}
}

// failFaulted answers what resend has put aside, when the batch was sent with that error.
func (l *loop) failFaulted(faulted []wire.Request, err error) {
	if errors.Is(err, syscall.EFAULT) {
		l.export.faulty.Store(true)
	}
	for i := range faulted {
		l.conn.counters.Retract(faulted[i].Command, faulted[i].Length)
		l.handOver(&faulted[i], errFault)
	}
}
