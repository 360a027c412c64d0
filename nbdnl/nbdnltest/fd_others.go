//go:build !linux

package nbdnltest

import "syscall"

// The fake kernel takes sockets on Linux only.

func lookupSocket(uint32) (int, syscall.Errno) { return 0, syscall.EINVAL }
func sendDisc(int)                             {}
func isDead(int) bool                          { return false }
func limitSends(int, uint64)                   {}
func shutdown(int)                             {}
func closeFD(int)                              {}
func waitDead(int)                             {}
func threadID() int                            { return 0 }
