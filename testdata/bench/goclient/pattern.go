package main

import "encoding/binary"

// fillPattern writes what fill_pattern of loadgen does: each word is a function of its offset and
// of the salt. The length of p is a multiple of 8.
func fillPattern(p []byte, off int64, salt uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.NativeEndian.PutUint64(p[i:], scramble(off+int64(i))^salt)
	}
}

// isPattern reports whether p is what fillPattern writes.
func isPattern(p []byte, off int64, salt uint64) bool {
	var wrong uint64
	for i := 0; i < len(p); i += 8 {
		wrong |= binary.NativeEndian.Uint64(p[i:]) ^ scramble(off+int64(i)) ^ salt
	}
	return wrong == 0
}

func scramble(v int64) uint64 { return (uint64(v) + 1) * 0x9e3779b97f4a7c15 }
