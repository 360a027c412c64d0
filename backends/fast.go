package backends

import (
	"errors"
	"os"
)

// ErrWouldBlock is the answer of ReadAtTo and WriteAtFrom, and of nothing else,
// to a request that they cannot finish without waiting: for a disk, a network, a
// lock that is held across I/O, a rate limit. A call that returns it has left no
// trace: it is not counted, has taken no token and used up no injected fault.
// The server then calls ReadAt or WriteAt on another goroutine.
//
// It is compared with ==; never wrap it.
var ErrWouldBlock = errors.New("backends: would block")

// A ReaderAtTo answers reads without blocking and, where it can, without
// copying. It is to ReadAt what io.WriterTo is to io.Reader.
type ReaderAtTo interface {
	// ReadAtTo gives w exactly the n bytes at off, in order, and returns nil.
	// It agrees with ReadAt byte for byte. After any error the caller forgets
	// what w was given and answers with the error; after ErrWouldBlock it asks
	// ReadAt instead.
	//
	// All requests of a connection wait for the call, so it takes tens of
	// microseconds at most. Calls may be concurrent. w is dead after the
	// return.
	ReadAtTo(w Reply, off int64, n int) error
}

// A Reply collects the data of one read, in order. Servers and test kits
// implement it and nobody else does, so that it may grow methods.
type Reply interface {
	// Bytes adds p by reference. p stays the backend's, and must stay mapped
	// and belong to the same bytes of the device until the server has let go of
	// the backend (every Transmit on it returned): it is sent later. Trims may
	// turn it to zeros and overlapping writes may change it meanwhile, but it
	// must never hold bytes of another offset. Who cannot promise that uses
	// Buffer.
	//
	// A mapping of a file that was truncated, or whose disk fails, breaks that
	// promise. The request is answered with an error then; but if the beginning
	// of its reply was sent, before memory was met that is not there, the
	// connection is lost. From then on the server copies what it is given, where
	// a fault is like any other panic of a backend: an error of one request.
	Bytes(p []byte)

	// Zeros adds n zero bytes without touching memory: a hole.
	Zeros(n int)

	// Buffer adds n bytes of the server's memory with undefined content and
	// returns them to be filled before the return. nil means that there is no
	// room: return ErrWouldBlock.
	Buffer(n int) []byte

	// File adds n bytes of f from off on, to be sent without passing through
	// this process, and reports whether it did. If it did, the pages of the file
	// are held, and nothing that becomes of f is an error any more. It did not
	// if f has fewer bytes there or can't be read, if they are not the whole of
	// the reply, or if the transport, or the moment, does not allow it: use
	// Buffer, or return ErrWouldBlock, so that ReadAt tells what is wrong. Offer
	// only what is in the page cache: the rest is waited for.
	//
	// Later writes to these pages may show in the reply, and zeros in the place
	// of bytes that are cut off meanwhile.
	File(f *os.File, off int64, n int) bool
}

// A WriterAtFrom takes writes without blocking on its storage and, where it can,
// lets their data arrive where it is to stay. It counts only beside io.WriterAt.
type WriterAtFrom interface {
	// WriteAtFrom takes exactly n bytes from r, in order, and stores them at
	// off. It may return ErrWouldBlock only before it first called r.Into. After
	// any other error the server drains the rest of the data and answers with
	// the error. When Into fails, its error is returned unchanged: the
	// connection is gone and the range may be half written, for its client was
	// never told otherwise, but from then on it reads the same every time.
	WriteAtFrom(r Payload, off int64, n int) error
}

// A Payload is the data of one write.
type Payload interface {
	// Into fills the whole of p with the next bytes. It may wait for the client
	// at the other end, so hold no lock across it.
	Into(p []byte) error
}
