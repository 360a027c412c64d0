package backends

import "context"

// A ReaderAtContext is a Backend whose reads can be given up: it waits for a
// network, or for something else that may never come.
type ReaderAtContext interface {
	// ReadAtContext is ReadAt until ctx ends, and is called in its place. It
	// then returns as soon as it can, with any error; when it has returned, p is
	// not used any more.
	//
	// The server makes one context for a connection, and ends it when nobody
	// waits for the requests of that connection any more: the client has hung
	// up, as the kernel does with a connection on which a request was not
	// answered in time, or the connection was closed on this side. All calls
	// for the connection get the same one, so that nothing is allocated for a
	// request. It has no deadline, and no values.
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// A WriterAtContext can give up writes. It counts only beside io.WriterAt.
type WriterAtContext interface {
	// WriteAtContext is WriteAt until ctx ends, and is called in its place. What
	// holds of ReadAtContext holds of it, too. A write that was given up may
	// have been made in part, but after the return no more of it is: newer data
	// may be written to the same range then.
	//
	// A write that is to be durable goes to WriteAtFUA where there is one.
	WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
}
