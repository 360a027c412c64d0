// Package nbdnl controls the Linux kernel's network block devices: it connects sockets to
// /dev/nbdN, looks at devices, and disconnects them, by the kernel's generic netlink family, or by
// ioctls.
//
// # Connecting
//
// A [Client] gives the kernel sockets whose other ends speak the transmission phase of the NBD
// protocol, be they of a TCP connection to a server elsewhere, after the handshake, or of a socket
// pair that this process serves itself (package server/blockdev does that). [Client.Connect] lets
// the kernel choose the device, which is free of races; [Client.ConnectIndex] asks for one.
//
// Start to serve the sockets before connecting them: the first program that opens the device waits
// for its partition table. Give every device an identifier of its own ([NewIdentifier]) and a
// timeout. The identifier is the only way to know a device again: indexes are used anew, and the
// owner in sysfs is the number of a thread.
//
// What Connect returns can be used at once. [Client.WaitReady] waits for a device that another
// process is connecting, and for partitions, which the kernel looks for in the first open.
//
// The kernel takes what it does not know, or can't do, without a word. So a connect looks at what
// has become of it: a device that lacks what correctness depends on, such as flushes, is
// disconnected again, and the error is an [UnsupportedError]. What is merely offered shows in
// [Status].Flags if it is in force.
//
// # Replacing connections
//
// With a DeadConnTimeout, a device outlives its connections: [Client.Reconfigure] puts a new socket
// in the place of a dead one, and requests go on. The kernel drops a socket that it has no use for,
// silently; Reconfigure finds out, tries again while the kernel may not have noticed the death yet,
// and then says which were dropped, in a [DroppedError]. Requests that were sent on the old
// connection are sent again when their timeout ends, so no late answer to them may change anything
// by then: cut the old server off before the new socket is passed.
//
// The kernel's receiver of the old connection may still be at work when a new one takes its place.
// It holds no reference to the old socket (nbd_reconnect_socket; Linux 7.2 was seen to crash of
// it), and its last act is to shut down the socket that it finds in the place
// (nbd_mark_nsock_dead), be it the new one: with Linux 6.12 in about one of ten cases where a
// request's timeout had ended the old connection and the new socket was given at once. The
// announcement of the death is no sign that the receiver has ended. So Reconfigure waits for that,
// before and after, by what the names and states of the kernel's threads show, and says in a
// [ShutDownError] which sockets were shut down all the same: give others, at once. A receiver that
// can't be seen may come later than Reconfigure waits, in a container whose host is very busy. So
// whoever serves a connection replaces it whenever it ends.
//
// # Disconnecting
//
// The kernel's own command, [Client.Drop], drops what is cached, succeeds for a mounted device, and
// leaves a husk on which all I/O fails and whose index stays taken until its last user lets go.
// [Client.Detach] does what one means instead: it refuses a device that is another's or in use, and
// says whose and by whom; it writes what is cached, disconnects, and returns when the index is
// free.
//
// Programs that use this package keep out of each other's way with claims on indexes (package
// claim), which Detach takes by itself. Who uses a device tells package holder ([Client.Holders]).
// The kernel knows nothing of claims, and has no disconnect on a condition: between the last look
// at the identifier and the command, a few microseconds, a program that does not claim could put
// another device in the place of this one. A reconfigure the kernel itself refuses if the
// identifier is another.
//
// # Netlink and ioctls
//
// The kernel has two interfaces to the same devices, and a Client uses either: netlink, unless the
// kernel hides it, as up to Linux 6.1 in every network namespace but the initial one
// ([System].NetNS). There it uses ioctls, and so it does where [System].Mode asks for them. Devices
// of both live side by side, and each interface disconnects those of the other. [Status].Mode says
// how a device was connected. By ioctls
//
//   - a device lives by a thread, which the Client has for it and which is in the kernel for as
//     long as the device lives. It ends when the process ends or is stopped (SIGSTOP, Ctrl-Z, a
//     debugger, a frozen control group, a suspended machine), when the last connection dies, and
//     when the Client is closed. No other signal ends it, for the thread takes none; so a process
//     with such a device can't change its user or groups (syscall.Setuid waits for all threads).
//   - there is no identifier. The Client that has connected a device knows it, to others it is a
//     stranger's, which they disconnect without regard to the owner ([Client.DropAny],
//     [DetachOptions].Any) or not at all.
//   - size, block size and timeout can be changed by the Client that has connected the device.
//     Connections can't be replaced, and there are no DeadConnTimeout and no ClientFlags: an
//     [UnsupportedError] says so.
//   - no new device is made. Connect takes a free one, which it claims ([System.Claims]), for the
//     kernel does not choose; ConnectIndex leaves the claim to the caller. Of two programs that set
//     up the same device by ioctls, the one that comes second may end what the first has begun:
//     this package does not, and keeps away from idle devices that somebody has open.
//   - the server's process has the device open. That does not count as use; before Linux 6.1
//     [DetachOptions].Server must say which process that is, where it is another.
//   - [Client.Status] tells idle from held by who can be seen to have the device open, and a
//     [Watch] hears of no dead connections.
//
// # State
//
// The kernel's status command reports as "connected" what is merely open, and goes on to do so for
// what is disconnected. [Client.Status] and [Client.Devices] put it together with sysfs and need no
// privilege. They can't see which connections of a device are dead, or that another process has
// disconnected a device that is still held.
//
// A [Watch] tells of each connect, disconnect, resize and dead connection on the machine, whoever
// causes it. It needs no privilege either, and does nothing while nothing happens.
//
// # Blocking
//
// A command runs inside the call that sends it, under a lock that all of generic netlink shares,
// and sleeps there where no signal reaches it: a disconnect for as long as a send to a server that
// has stopped reading takes (for ever, without a timeout), and everybody else's commands behind it.
// So each runs in a goroutine of its own, and the methods return when their context ends, with an
// error that matches the context's; what a late connect did is undone. At most eight commands of a
// Client, and as many threads, wait in the kernel at a time. Always pass a context that ends.
//
// A process of which a goroutine is stuck in the kernel can't exit, and no signal kills it, until
// the kernel comes back. Even the search for the driver gets stuck. It is therefore put off until
// the first command, and what sysfs shows, such as the [Client.Status] of a connected device, asks
// the kernel nothing. [Client.Devices] asks for those that are not connected.
//
// # Kernels
//
// Seen to work with Linux 5.10, 6.1, 6.12, 7.2 and 7.3, on all of which the tests run ("make
// matrix"). Each difference below is tried out there (features of package nbdnltest), and a kernel
// that does otherwise fails them. Versions are those of these kernels; a change may have come with
// one in between.
//
//   - Up to 5.10 the kernel keeps no identifiers. A Client knows those devices that it has
//     connected itself; commands with the identifier of another match errors.ErrUnsupported, and
//     others' mode and owner are unknown (its driver would look up a thread that may have ended).
//     Any kind of socket is taken, and so are sizes of 2^63 bytes and more. DestroyOnDisconnect can
//     stop all of generic netlink for good: leave it alone. A disconnect waits while requests wait
//     for a new connection, for as long as DeadConnTimeout, and every command behind it: keep that
//     short.
//   - Up to 6.1 only processes in the initial network namespace find the netlink family, and nobody
//     but modprobe loads the module; since 6.12 who looks for the family does.
//   - Up to 6.1 FlagSendWriteZeroes and FlagRotational are ignored. Where they are not, up to 7.2,
//     the next user of the index inherits them.
//   - Since 6.12 a new size waits for the requests that are in flight, with all other commands
//     behind it.
//   - Since 6.12 a write cache that an administrator has switched off (queue/write_cache) stays so
//     for the next user of the index, to whom no flushes would be sent. Connect then fails with an
//     [UnsupportedError] for the setting "flush"; earlier drivers switch it on again.
//   - With 5.10, 6.12 and 7.2 an idle device goes on to show how long the trims of its last user
//     could be, which means nothing; with 6.1 and 7.3 it does not.
//   - With 5.10 and 6.1 the kernel may not receive from some of several connections for as long as
//     the device lives, when it is slow to make threads: from 4 of the first 12 devices after a
//     boot, with four connections each, on a busy machine. Requests on these hang until their
//     timeout. [Client.WaitReceivers] tells.
//   - After 6.1 and before 7.2 a signal to a thread that does I/O on the device can break a
//     connection in the middle of a request; package server/blockdev has the remedy.
//   - With all of them a socket that takes the place of a connection may be shut down by that one's
//     receiver, and 7.2 was seen to crash when it was given in the same moment: see above.
//   - Block sizes beyond the page size need 7.2, built with transparent huge pages.
//
// Changing devices takes CAP_SYS_ADMIN in the initial user namespace, always.
//
// On other systems than Linux everything returns errors.ErrUnsupported.
package nbdnl
