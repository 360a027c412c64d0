package server

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// watchHangup calls gone, on a goroutine of its own, when both directions of nc are shut down, or
// it has failed. It costs nothing as long as neither happens: an epoll that asks for no other event
// is woken by none. stop ends the watch, and waits for gone.
func watchHangup(nc net.Conn, gone func()) (stop func()) {
	none := func() {}
	s, ok := nc.(syscall.Conn)
	if !ok {
		return none
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return none
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return none
	}
	if err := unix.SetNonblock(fd, true); err != nil { // The runtime polls what does not block.
		unix.Close(fd)
		return none
	}
	poll := os.NewFile(uintptr(fd), "hangup")
	var failed error
	err = raw.Control(func(socket uintptr) {
		failed = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(socket), &unix.EpollEvent{}) // HUP and ERR come unasked.
	})
	events, noEvents := poll.SyscallConn()
	if err != nil || failed != nil || noEvents != nil {
		poll.Close()
		return none
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		hungUp := false
		err := events.Read(func(fd uintptr) bool {
			n, err := unix.EpollWait(int(fd), make([]unix.EpollEvent, 1), 0)
			hungUp = n > 0
			return hungUp || err != nil && err != unix.EINTR
		})
		if err == nil && hungUp {
			gone()
		}
	}()
	return func() {
		poll.Close()
		<-done
	}
}
