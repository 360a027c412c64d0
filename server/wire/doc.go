// Package wire has the numbers of the NBD protocol and the layout of its messages: pure functions
// from values to bytes and back, for a server and for a client. It does no I/O, keeps no state and
// allocates only where a doc comment says so.
//
// The reference is the protocol document,
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; names of its constants are in
// the comments. All numbers are big-endian on the wire. Offsets and lengths are 64 bits wide here,
// also where a message has room for 32: the functions that write such a message say so.
//
// Functions named Append write at the end of a slice and return it, as append does. Functions named
// Decode take what a peer has sent, of a fixed size, and check its magic number and nothing else.
// Functions named Parse take data of a length that the peer has chosen, and never read past it.
package wire
