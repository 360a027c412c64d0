package rawio

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// WatchHangup calls gone, on a goroutine of its own, when both directions of a socket are shut
// down, or it has failed. It costs nothing as long as neither happens: an epoll that asks for no
// other event is woken by none. stop ends the watch, and waits for gone.
func WatchHangup(s syscall.Conn, gone func()) (stop func(), err error) {
	raw, err := s.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // The runtime polls what does not block.
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	poll := os.NewFile(uintptr(fd), "hangup")
	var failed error
	err = raw.Control(func(socket uintptr) {
		failed = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(socket), &unix.EpollEvent{}) // HUP and ERR come unasked.
	})
	events, noEvents := poll.SyscallConn()
	if err := errors.Join(err, os.NewSyscallError("epoll_ctl", failed), noEvents); err != nil {
		poll.Close()
		return nil, err
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
	}, nil
}
