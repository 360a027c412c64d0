// Package server is the serving side of the NBD protocol.
//
// An [Export] offers a backend; a [Conn] serves it to one client over a connected stream socket, of
// which an export may have many. The request loop is the same for the Linux kernel (package
// blockdev joins the two) and for a client across a network.
//
// # How requests are executed
//
// Each connection has a goroutine that receives a burst of requests with one system call, executes
// what does not make it wait, and sends the replies with another one: between two goroutines a
// request would cost several times as much. What may wait goes to workers, a goroutine for each
// request, whose replies go out as they come. Which is which shows in what the backend does:
//
//   - [backends.ReaderAtTo] and [backends.WriterAtFrom] say for each request whether they would
//     block. Data go from the backend's memory or file to the socket, and from the socket to the
//     backend's memory, without a copy in between.
//   - Plain calls are timed. They begin on workers and leave them for a trial, if that can cost
//     little; a few slow ones, or a single one that stalls, bring them back, and the next trial
//     comes later than the last. No flag says so.
//   - What makes data durable always goes to a worker.
//
// # What is negotiated
//
// Fixed newstyle, with simple replies, or structured ones for a client that asks for them: zeroes
// that a backend tells of ([backends.Reply], Zeros) go out as holes, unless they are short or
// NBD_CMD_FLAG_DF is set; so does a READ that a worker has, of nothing but zeroes, where the
// backend knows that ([backends.Extenter]). Replies to other requests than READ and BLOCK_STATUS
// are simple all the same, which the protocol allows.
//
// TLS is for a client that asks for it (NBD_OPT_STARTTLS), or for all ([Server.RequireTLS]). What
// was negotiated before it is forgotten. A connection over TLS takes the way through package
// crypto/tls, one in plain text that of system calls.
//
// Meta contexts are base:allocation and those of the backend ([backends.Contexter]). The former has
// extents as the backend has them ([backends.Extenter]), in whole blocks, of which one that has any
// data is data; without that ability, everything is data. At most 4096 extents of each context come
// in one reply.
//
// A client that asks for extended headers has them for everything, and lengths of 64 bits: TRIM,
// WRITE_ZEROES and BLOCK_STATUS of any range, in one request, the latter in some contexts of those
// that were chosen. READ and WRITE are for 32 MiB at most all the same. A payload that does not
// belong to a request is taken from the stream, and the request refused; one beyond 32 MiB ends the
// connection, as a longer WRITE does.
//
// # What a client can rely on
//
// Every request that was read is answered, on the connection it came from; answers come in the
// order in which requests finish. The bounds of a request are checked before the backend sees it
// and before memory is taken for it. A request that fails is answered with an error, and the
// connection goes on; the data of a READ are there before its reply begins, so a failing backend
// never leaves half a reply. That is true also of data that go from a file to the socket without
// passing through the process ([backends.Reply]): the pages are held first, and a file that gets
// shorter meanwhile, or a disk that fails, is an error of one request. FLUSH covers every write
// that was answered before, on any connection. FUA is kept also where the backend has nothing of
// the kind.
//
// What changes bytes (WRITE, TRIM, WRITE_ZEROES) is not executed while something older is at work
// on, or waits for, some of the same bytes for another connection, whether that is alive or dead.
// For a client that loses its patience sends a request again over another connection, as Linux
// does, and the first one, had it still been in the backend, might have ended on top of newer data.
// So a write that hangs delays who writes the same bytes, and nobody else: a request that waits
// occupies a place among Options.MaxInFlight of its connection, and is given up when that is closed
// or the client hangs up. Of a connection whose client has hung up meanwhile, nothing is executed
// that had to wait, behind a slow request or because the process stood still. A client that keeps
// the rest of a payload to itself makes others wait for a second. Within a connection nothing is
// ordered. Three things are left to others: a backend that does not keep the promise of
// [backends.WriterAtFrom] not to block; a client that loses its patience within half a second; and
// a TCP client, of which the server can not tell that it has hung up.
//
// A client that sends requests again does so without an end: each new connection begins their time
// anew. An export that was told of its clients' patience ([Export.SetPatience]) counts the time of
// a request from when it came first, on whatever connection, and answers it with EIO when that is
// over, though the backend is still at work on it. Its range stays locked until the backend has
// come back, for requests of the same connection too, so that the old bytes can't land on newer
// ones. Then, and until no repetition is to be expected any more, all that a backend does not
// promise to do at once is left to workers; what overlaps a request that the backend never came
// back from fails before it costs its connection; and when the backend hangs in as many requests of
// dead connections as one connection may have in flight (16 at least), it gets no more before it
// has come back from some. Where it is not known what a dead connection has left unanswered, as
// when its goroutine hung in the backend, whatever comes while that can still be repeated is taken
// for a repetition that is as old as it can be.
//
// A backend that can give up ([backends.ReaderAtContext], [backends.WriterAtContext]) is told when
// nobody waits any more, by the context of the connection: the client has hung up, or the
// connection was closed.
//
// An export may change its size while it is served ([Export.Resize]); requests are checked against
// the size of the moment in which their turn comes.
//
// # Another process in this one's place
//
// [Server.Hold] has a server stand still: every request that was read is answered, nothing more is
// read, and who connects waits in the backlog of the listening socket. What another process needs
// to go on is there then: for each client what was agreed on and what was received too early
// ([ServerHold.Sessions]), both plain data, and its descriptor, as that of each listener. It makes
// sessions of them ([Server.Resume], [Server.ServeSession]). [ServerHold.Leave] leaves the clients
// to it, and [ServerHold.Release] keeps them. The state of TLS stays in the process, so clients
// over TLS get all replies that are due, then the end, and connect anew.
//
// # Memory
//
// A connection has at most Options.MaxInFlight requests and 64 MiB of payload with workers. When
// either is reached the server stops reading until a reply has gone out; so it does when all
// clients of an export reach the MaxMemory of their [Server], which disconnects who keeps memory
// that others wait for. While a connection is busy it also borrows 512 KiB to receive into, and 256
// KiB for replies that have to be copied; while it waits for its client it holds about 15 KiB.
// Memory is taken by the lengths that passed the checks, and returned to pools.
//
// # Errors on the wire
//
// An error that is or wraps a [syscall.Errno] known to the protocol goes through as it is; EROFS
// and EACCES become EPERM, EDQUOT and EFBIG become ENOSPC; fs.ErrPermission becomes EPERM and
// errors.ErrUnsupported ENOTSUP; everything else is EIO. The whole error, with operation and
// offset, goes to the log and to [Export.LastError]. A panic of the backend is an EIO too, logged
// with its stack; so is a memory fault, which a mapping meets of a file that was truncated
// ([debug.SetPanicOnFault]).
//
// # What an operator can see
//
// [Conn.Stats] and [Export.Stats] tell at any time how many requests of each kind there were, their
// bytes, errors and latencies ([Histogram]), how many are in flight, and for how long the oldest of
// these has been: a backend that hangs shows there before anything ends. To count costs about 1 %
// of what a request costs at least, because the clock is read twice for each burst and not for each
// request.
//
// Options.Logger gets a record for each request that failed, was refused, or took
// Options.SlowRequest, with operation, offset, length, error number and duration. A dying disk does
// not fill the log: 10 records of each of these in 10 seconds, then only how many more there were.
// Requests never wait for the log, which may lie on the device that they are for.
package server
