// Package nbd is an NBD client in pure Go: an export of a server becomes a backend.
//
//	disk, err := nbd.Dial(ctx, "nbd://example.com/disk", nbd.Options{})
//
// A [Client] reads and writes like any other backend of package backends, and so can be a block
// device (server/blockdev), be served again, or be copied. Its methods may be called concurrently:
// requests of all callers are in flight at once on each connection, and replies come in any order.
//
// # What is negotiated
//
// [Dial] asks for the most that there is, and goes on with what the server has: extended headers,
// else structured replies, else simple ones; meta contexts; block sizes. Servers that do not know
// NBD_OPT_GO are asked with NBD_OPT_EXPORT_NAME. The oldstyle negotiation is not supported. Who
// wants to know what a server has, or to choose step by step, makes a [Handshake].
//
// # Whom it believes
//
// A server is not trusted: sizes, flags, lengths, cookies, the order and the ranges of the chunks
// of a reply, extents and texts are checked before they are used, and memory is not taken at its
// word. A server that breaks the protocol loses the connection ([ProtocolError]). A read succeeds
// only if every byte of it came, once.
//
// With TLS (a URI with nbds, or [Options.TLS]) nothing of what was said in plain text is believed
// later.
//
// # Handover
//
// A process can be replaced by another one, such as a later version of itself, without the server
// noticing: [Client.HandOver] has the client stand still and returns its connections as descriptors
// with a [Document], and [URI.Inherit] goes on with them. Connections with TLS stay behind, since
// their keys do: the other process makes new ones. Of what [DialDirect] has made, the
// kernel has the connections, and [URI.InheritDirect] needs no more than the [Agreement].
package nbd
