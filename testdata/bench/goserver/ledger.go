package main

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/server"
)

// transmitInLedger serves a session, as Server.Serve would. With a ledger the connection keeps
// account of what it has begun, in shared memory, as a device's does.
func transmitInLedger(session *server.Session, ledger bool) error {
	if ledger {
		const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_ANONYMOUS
		size := uintptr(unix.Getpagesize())
		page, err := unix.MmapPtr(-1, 0, nil, size, prot, flags)
		if err != nil {
			return err
		}
		defer unix.MunmapPtr(page, size)
		session.Conn().SetLedger((*atomic.Uint32)(page))
	}
	return session.Conn().Transmit()
}
