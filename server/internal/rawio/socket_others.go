//go:build !linux || !(amd64 || arm64) || race || nbd_portable

package rawio

import (
	"net"
	"syscall"
)

// scratch is nothing: net.Buffers makes its own.
type scratch struct{}

func newSocket(nc net.Conn, raw syscall.RawConn) Conn { return newPortable(nc) }
