// Package blockdev makes a backend a block device of the running Linux kernel.
//
// [Connect] joins the two halves that the other packages are: it serves the backend with package
// server over socketpairs, and has the kernel connect their other ends with package nbdnl. All of
// it lives in the calling process, and the device with it:
//
//	dev, err := blockdev.Connect(ctx, disk, blockdev.Options{})
//	if err != nil { … }
//	defer dev.Close()
//
// It needs the nbd module, and CAP_SYS_ADMIN in the initial user namespace. Where netlink is out of
// sight, or [Options].Client is one of nbdnl.System{Mode: nbdnl.ModeIoctl}, the device is connected
// by ioctls, which is less (package nbdnl, "Netlink and ioctls"): a connection that dies is not
// replaced, and the device ends with the last one.
//
// # Settings of the kernel
//
// Besides what [Options] say, every device gets, after each connect since some of it stays with the
// index from one use to the next:
//
//   - max_sectors_kb 1024, or less if the backend or the driver takes less: the longest read or
//     write that the kernel sends.
//   - From Linux 6.2 to 7.1, no I/O scheduler, and connections with 8 MiB of send buffer: these
//     kernels lose a connection if a signal arrives in the middle of a send. Elsewhere both stay as
//     the system has them.
//   - Zeroes as a command of their own only if the backend makes them without writing them; the
//     kernel writes them otherwise.
//
// # Connections that die
//
// The kernel shuts a connection down when a request on it has waited for [Options].Timeout, and
// takes it for dead when its stream ends or goes wrong. The requests that were in flight on it are
// sent again over another one, each when its own time is up. As long as there is another one, or
// requests wait for one ([Options].DeadTimeout), the device goes on, and puts a new connection in
// the place of the dead one; [Device.State], [Device.Alive] and [Device.Changes] tell of it. With
// none left and nothing to wait for, or when the kernel has given up, the device is [Device.Done].
//
// Of a write that is executed twice, the first time must not end after the second, for newer data
// may have been written in between. So what is sent again is not executed before the backend has
// let go of the first (package server, "What a client can rely on"). Reads that hang are repeated
// at once.
//
// A request that hangs costs a connection each time when its timeout is over. Without DeadTimeout
// the device ends with the last of them. With it each is replaced within moments, whatever the
// backend is at, and all but the request goes on. The request fails with EIO, however often the
// kernel sends it again: not before Timeout and DeadTimeout together have passed since it was sent
// first, and at the latest 10 seconds after that. (Until everything that hung with it has been sent
// again, what comes new has its DeadTimeout and 7 seconds, if that is less than Timeout: nothing
// tells it from what was lost unseen.) A write that has failed so keeps its range until the backend
// comes back from it: what is written there meanwhile waits, or fails too, and never is overwritten
// by the old bytes. Timeout is to be above whatever the backend may take; one that takes longer
// each time answers nothing.
//
// A backend that waits for a network can implement [backends.ReaderAtContext] and
// [backends.WriterAtContext]. Their context ends when the kernel has given up the connection, at
// Kick and at Close, which then have nothing to wait for.
//
// [Device.Kick] ends a device whose I/O is stuck, at once and with I/O errors for all of it.
//
// # Exports of other servers
//
// [ConnectRemote] has the kernel connected to another server itself. Its requests do not pass
// through this process, which watches over the connections, and gives the kernel another one for
// each that is lost, as long as the device exists: the server may be away for any time. What is
// asked of the device meanwhile waits for [Options].DeadTimeout, and fails at once after that,
// until there is a connection. [Device.Outage] tells how it is.
//
// What was in flight on a connection that is lost the kernel sends again when its
// [Options].Timeout is up, and not before (nbd_xmit_timeout). A request that the server needs
// longer for each time is sent again for ever: nobody but the kernel knows of it. A connection that
// was lost is reset before the next one is made, lest an old write reach the server after a newer
// one; what the server has received of it by then, it must not execute after it has accepted
// another connection. If this process dies, the device goes on until a connection is lost. It can
// hand its watch over to another process ("Devices that outlive their process").
//
// # Another size
//
// [Device.Resize] changes the size of a device in use. Between the moment in which the kernel has
// less than before and the one in which the server knows, and in a cache that was not written
// before a shrink by force, there may be writes beyond the new end. They are answered with an
// error, which harms nothing else.
//
// # Writes that are lost
//
// The kernel acknowledges a write when it has it in its cache, and sends it later. If the backend
// refuses it then, or there is no connection, the next one to sync is told, whoever that is, or
// nobody is. The owner of the device is told by [Device.Flush] and [Device.Close], also of what
// went wrong earlier, until it says [Device.Acknowledge]. The number of a [LossError] tells whether
// it is new. Flush is what to call before a snapshot of the backend, too: it writes also what file
// systems keep back, those on partitions, volumes, arrays and loop devices that stand on the device
// included.
//
// # Another backend
//
// [Device.Swap] puts another backend of the same size in the place of one in use: a layer above it,
// a copy, or a mirror that has caught up. [Device.SwapFunc] holds all requests while it is made.
//
// # Many devices
//
// A [Pool] has indexes ready before they are needed, leased from other processes, and finds what a
// process has left that died: [Pool.Left] lists it, [Pool.Reclaim] clears it away. [Pool.Stats]
// says what a pool is doing, [Pool.Wait] waits for its last device. testdata/pool is a program that
// uses all of that.
//
// To end a device in order, or to reclaim one, takes looks at every descriptor of every process:
// nothing else tells who has it open. Devices of one client that are ended at the same time, as
// those of a pool, share these looks, and those of different clients do not: so many devices are
// best ended by goroutines of one process, all at once.
//
// How long a connect takes is for the kernel to say: up to 7.2 it stops the queue once for each
// connection, which makes few connections quick. On top of that come the open that scans the
// partitions, unless [Options].Unopened leaves it to others, and settings of the queue where they
// are not what they should be.
//
// # Devices that outlive their process
//
// A device by netlink is the kernel's, and can go from one process to another.
//
// [Device.HandOver] has it stand still for a moment, and gives its connections to another process,
// which goes on with them ([Adopt]); [Device.HandOverTo] and [TakeOver] do that over a Unix socket.
// The kernel notices nothing. What has to be known goes along: what was received and not executed,
// statistics, losses, the lease of the index. Each step may fail, and the other process may die at
// any moment: one of the two serves the device, with nothing lost and no write repeated. What the
// backend has open is the programs' own: [HandOverOptions] takes descriptors along, and a note.
//
// Of a device of [ConnectRemote] the kernel has the connections, and what goes to the other process
// is the watch over them ([AdoptRemote], and [TakeOverEither] for devices of both kinds). Nothing
// stands still but the replacement of lost connections, and nothing waits.
//
// After a crash what is asked of the device waits, for DeadTimeout. [Pool.Left] lists what a
// process has left that died, and [Pool.Attach] goes on with one of those, if the backend is the
// one for it; [Attach] is for programs that keep account otherwise. New requests are served at
// once. What was in flight at the moment of the crash the kernel sends again when the timeout of
// each request is up, and not before. Whether the backend has a write among them is not known: it
// is executed again, which is all the same to who has waited for it.
//
// With [Options].Recoverable there is a quicker way: another process, the keeper, holds copies of
// the connections, and of a page of memory that says of each whether it stands still
// ([Device.Keep]). As long as it does the kernel sees no death, and [Recover] goes on over those
// connections on which nothing had been begun that was not answered, as at idle. Only the others
// are replaced, in the way of Attach, and [Document.Cut] has what is asked meanwhile wait for that.
// The keeper touches no request, and asks again after each change that [Device.Changes] tells of.
//
// The crash of a process that has watched over a device of [ConnectRemote] is noticed by nobody
// until a connection is lost. [RecoverRemote] and [AttachRemote] go on with the watch, with what a
// keeper has of the connections and without.
//
// testdata/handover is a program whose device outlives it, by HandOver and by Attach. A device by
// ioctls ends with its process.
//
// # Deadlocks
//
// The kernel waits for the server, so a server that waits for the kernel may wait for ever. These
// are the ways in which that happens:
//
//   - The serving process uses its own device. Reading, writing and syncing it with system calls
//     works, for each blocks a thread only. Mapping it, or a file on it, into memory does not: a
//     goroutine that waits in a page fault keeps its processor, and the garbage collector waits for
//     that, and the server that could end the fault for the garbage collector. Nor should the
//     process have its working directory, its binary, its log or its swap space there.
//   - The backend uses the device, directly or through a file system: a request that must wait for
//     another request of the same device to be answered first. The same holds for two devices each
//     of which is stored on the other.
//   - Memory is short. The kernel writes dirty pages to the device in order to free memory, and the
//     server needs memory to take them. Keep the backend from growing while it serves, write
//     backing files with direct I/O or without, protect the process (mlockall, oom_score_adj
//     -1000), and leave the machine some room. A timeout ends such a wait at the price of I/O
//     errors.
//   - A backend that waits for ever. The requests behind it wait too, once [Options].MaxInFlight
//     are in it, and so does everyone who opens the device. The kernel gives up a request after
//     [Options].Timeout; nobody can take it back from a backend without a context. Kick and Close
//     free those who wait for it, and Close reports that it is still there. A backend that waits
//     for a network takes the context, or its own timeout, shorter than the device's.
//   - A lock that a backend holds while it calls Close or Disconnect of its own device: both write
//     what is cached, which needs the backend.
package blockdev
