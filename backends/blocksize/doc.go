// Package blocksize has a backend that takes only large blocks serve requests of small ones.
//
//	small, err := blocksize.New(large, 512)
//
// What covers whole blocks of the inner backend is handed on. Of a block that a read covers in
// part, the whole is read. A block that is written in part is read, changed and written. A block
// that is trimmed in part is left as it is.
//
// # What it costs
//
// A write of a part of a block moves two blocks, one after the other, and keeps other changes away
// from that block meanwhile.
//
// A block that is written in part is rewritten around that part. If the inner backend is cut off in
// the middle of a write, and leaves a mixture of old and new bytes, nothing is lost: the bytes
// around are the same in both. If it leaves anything else, as a disk may with a torn sector, bytes
// that were written long before can be lost, too. The same holds of a server across a network that
// executes a write after its connection was lost, in spite of what it has to promise (backends/nbd,
// Reconnect): it reaches whole blocks then.
package blocksize
