// Package activation takes the listening sockets that a process was started with by systemd, or by
// whoever else keeps to its protocol (sd_listen_fds(3)).
package activation

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
)

// firstFD is SD_LISTEN_FDS_START.
const firstFD = 3

// Listeners returns the sockets, none if there are none for this process. The environment forgets
// them: what the process starts has no business with them.
func Listeners() ([]net.Listener, error) {
	pid, n := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("socket activation: %w", err)
		}
	}
	count, err := strconv.ParseUint(n, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS=%q is no number of sockets", n)
	}
	var all []net.Listener
	for fd := firstFD; fd < firstFD+int(count); fd++ {
		f := os.NewFile(uintptr(fd), "socket "+strconv.Itoa(fd))
		if f == nil {
			return nil, fmt.Errorf("socket activation: LISTEN_FDS=%s: there is no descriptor %d", n, fd)
		}
		l, err := net.FileListener(f)
		err = errors.Join(err, f.Close())
		if err != nil {
			return nil, fmt.Errorf("socket activation: descriptor %d: %w", fd, err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // Its file is of who has made it.
		}
		all = append(all, l)
	}
	return all, nil
}
