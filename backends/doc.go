// Package backends defines what a block device is made of: the [Backend]
// interface, the optional interfaces by which a backend offers more than reads,
// and [Probe], the one place that finds out which of them a value offers.
//
// A plain Go type with ReadAt and Size is a read-only device. With WriteAt it
// is writable, with Sync its writes can be made durable, with Trim and Zero it
// gives space back. *bytes.Reader and *io.SectionReader are backends as they
// are.
//
// # Rules
//
// Methods may be called concurrently, also for ranges that overlap; which of
// two overlapping requests in flight wins, and where, is undefined, but bytes
// outside a request's range never change.
//
// Callers stay inside [0, Size()): a backend need not check ranges for its own
// sake. The slice p of a call belongs to the caller again when the call
// returns, and WriteAt does not change it.
//
// When a write returned, every later read sees it, on any connection; whether it
// outlives a crash is for [Syncer] to say. Without WriteAt a device is read-only,
// and all the other methods that change content are left unused.
//
// n == len(p) is success, whatever the error says of [io.EOF]. A short count is
// an error: a backend never pads a read with zeros that it did not store.
//
// Plain data methods take no context, for neither a pread nor a request on the
// wire can be taken back, and a call that returned early would leave p in use. A
// backend that waits for a network, and can give up, implements
// [ReaderAtContext] and [WriterAtContext], or takes its timeouts at construction;
// its Close unblocks the calls in flight.
//
// # Wrappers
//
// A wrapper (a partition, a counter, a cache) holds Probe(inner), declares
// every method that it can forward, and has a Caps method that returns the inner
// capabilities less those it hides. It does not embed the inner interface and
// has no Unwrap: whoever could reach below a copy-on-write layer would corrupt
// what lies there.
package backends
