//go:build !linux || !(amd64 || arm64) || race || nbd_portable

package rawio

import (
	"net"
	"syscall"
)

// scratch is nothing: net.Buffers makes its own.
type scratch struct{}

func newSocket(nc net.Conn, raw syscall.RawConn) Conn {
	return &portable{nc: nc, raw: raw}
}

// asks tells that recv knows what there is.
const asks = false

// yield is not called either.
func yield() {}

// recv is not called.
func recv(fd uintptr, p []byte) (int, error) { return 0, syscall.EAGAIN }
