// Package server is the serving side of the NBD protocol.
//
// An [Export] offers a backend; a [Conn] serves it to one client over a connected stream socket, of which an export may have
// many. The request loop is the same for the Linux kernel (package blockdev joins the two) and for a client across a network.
//
// # What a client can rely on
//
// Every request that was read is answered, on the connection it came from; answers come in the order in which requests finish.
// The bounds of a request are checked before the backend sees it and before memory is taken for it. A request that fails is
// answered with an error, and the connection goes on; the data of a READ are there before its reply begins, so a failing backend
// never leaves half a reply. FLUSH covers every write that was answered before, on any connection. FUA is kept also where the
// backend has nothing of the kind.
//
// # Memory
//
// A connection has at most Options.MaxInFlight requests and 64 MiB of payload in flight, plus 64 KiB to receive into. When either
// is reached the server stops reading until a reply has gone out. Memory is taken by the lengths that passed the checks, and
// returned to pools.
//
// # Errors on the wire
//
// An error that is or wraps a [syscall.Errno] known to the protocol goes through as it is; EROFS and EACCES become EPERM, EDQUOT
// and EFBIG become ENOSPC; fs.ErrPermission becomes EPERM and errors.ErrUnsupported ENOTSUP; everything else is EIO. The whole
// error, with operation and offset, goes to the log and to [Export.LastError]. A panic of the backend is an EIO too, logged with
// its stack.
package server
