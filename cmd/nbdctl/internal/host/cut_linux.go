package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Cut shuts down the connections between the process of e and the kernel's device
// from outside. It is for a process that is stopped or stuck: the kernel then
// waits for it no longer.
func (e *Entry) Cut() error {
	p, err := e.reach()
	if p == nil {
		return err
	}
	defer p.close()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.PID))
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range fds {
		if fd, err := strconv.Atoi(f.Name()); err == nil {
			errs = append(errs, p.cut(fd))
		}
	}
	return errors.Join(errs...)
}

// Kill kills the process of e, waits for its end, and removes what it left.
func (e *Entry) Kill(ctx context.Context) error {
	p, err := e.reach()
	if err != nil {
		return err
	}
	if p != nil {
		defer p.close()
		if err := p.kill(); err != nil && !errors.Is(err, unix.ESRCH) {
			return e.waiting(err)
		}
	}
	return e.Wait(ctx)
}

// reach is living, for what must be done to the process itself.
func (e *Entry) reach() (*process, error) {
	p, err := e.living()
	if p == nil && err == nil && !e.Ended() {
		err = fmt.Errorf("pid %d is not the process that serves it: that lives in a container; kick it there", e.PID)
	}
	return p, err
}

func (p *process) kill() error {
	return p.control(func(pidfd int) error { return unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) })
}

// cut shuts down the process's descriptor fd if it is a connection to the
// kernel: of all its sockets those have no name at either end.
func (p *process) cut(fd int) error {
	return p.control(func(pidfd int) error {
		copied, err := unix.PidfdGetfd(pidfd, fd, 0)
		if errors.Is(err, unix.EBADF) {
			return nil // closed meanwhile
		}
		if err != nil {
			return fmt.Errorf("pidfd_getfd: %w", err)
		}
		defer unix.Close(copied)
		if !unnamed(unix.Getsockname(copied)) || !unnamed(unix.Getpeername(copied)) {
			return nil
		}
		if err := unix.Shutdown(copied, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return fmt.Errorf("shutdown: %w", err)
		}
		return nil
	})
}

// unnamed tells a Unix socket without an address, which package unix reads as
// an abstract one whose name is empty.
func unnamed(a unix.Sockaddr, err error) bool {
	u, ok := a.(*unix.SockaddrUnix)
	return err == nil && ok && (u.Name == "" || u.Name == "@")
}

// control calls f with the pidfd.
func (p *process) control(f func(pidfd int) error) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}
