package server

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// nameOf says who a client is, for people: an address, or the process that has connected by a Unix
// socket.
func nameOf(nc net.Conn) string {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return nc.RemoteAddr().String()
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return "unix"
	}
	var cred *unix.Ucred
	err = raw.Control(func(fd uintptr) { cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil || cred == nil {
		return "unix"
	}
	return fmt.Sprintf("unix pid=%d uid=%d", cred.Pid, cred.Uid)
}
