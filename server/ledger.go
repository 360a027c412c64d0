package server

import "sync/atomic"

// A ledger counts what a connection has begun and not ended, in a word that may outlive the process
// (Conn.SetLedger). The zero value counts nothing. Safe for concurrent use.
//
// No order is needed but that of the program: the word is read when all threads are dead, and then
// what each of them did last is what it did last for everybody.
type ledger struct{ word *atomic.Uint32 }

func (l ledger) begin() {
	if l.word != nil {
		l.word.Add(1)
	}
}

func (l ledger) end() {
	if l.word != nil {
		l.word.Add(^uint32(0))
	}
}

// SetLedger has the connection keep account in word of what it has begun and not ended. It is to be
// called before Transmit, once. word is the connection's alone until Transmit has returned, and may
// lie in memory that outlives the process.
//
// The word is 0 only while the connection stands still: every request that was received is
// answered, each reply is wholly in the socket, no byte was received that is not consumed, and no
// call that receives or sends is being made. So whoever finds 0 when the process is dead, with all
// its threads, can go on with the socket as it is: the next byte there is the first of a request.
// Of any other value nothing follows but that something may have been begun.
//
// It is not 0 before Transmit, in a Hold, and from the end of the connection on, however that
// comes. It is never 0 of a connection over TLS, whose state is in the process, nor of one that is
// neither a *net.UnixConn nor a *net.TCPConn, nor on other systems than Linux.
func (c *Conn) SetLedger(word *atomic.Uint32) {
	word.Store(1) // for the loop, which is not at rest
	l := ledger{word}
	c.loop.inbox.ledger, c.flight.ledger, c.outbox.ledger = l, l, l
}

// rest notes that the loop waits for the first byte of a request, and that it is told before
// anything is received.
func (in *inbox) rest() {
	if in.ledger.word != nil && !in.resting && !in.holdsAny() {
		in.resting = true
		in.ledger.end()
	}
}

// rise notes that it does so no longer.
func (in *inbox) rise() {
	if in.resting {
		in.resting = false
		in.ledger.begin()
	}
}
