package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// A socket is a listener with a file that it removes when it is closed, if it is still
// its own: it may have been removed by hand, and another server's may be there.
type socket struct {
	*net.UnixListener
	path   string
	file   fs.FileInfo // as it was made; its inode stays in use as long as the socket
	remove sync.Once
}

// keep leaves the file to another process that listens on the socket.
func (s *socket) keep() { s.remove.Do(func() {}) }

// own reports whether its file is at the path.
func (s *socket) own() bool {
	now, err := os.Lstat(s.path)
	return err == nil && os.SameFile(now, s.file)
}

// Close removes the file before clients are refused: until then nobody takes the
// socket for that of a server that was killed.
func (s *socket) Close() error {
	var err error
	s.remove.Do(func() {
		if s.own() {
			err = os.Remove(s.path)
		}
	})
	return errors.Join(err, s.UnixListener.Close())
}

// startPatience bounds the wait for others that start at the same path, each of which
// takes milliseconds.
const startPatience = 10 * time.Second

// listenUnix listens at path. The file that a killed server left is in the way of the
// next one, which removes it if nobody answers there. Of several that start at once, one
// does so at a time: between its bind and its listen a server does not answer either.
func listenUnix(path string) (net.Listener, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), startPatience,
		fmt.Errorf("another server has been starting there for %s", startPatience))
	defer cancel()
	unlock, lockErr := host.LockPath(ctx, filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock"))
	if lockErr == nil {
		defer func() { _ = unlock() }() // The file is of no consequence.
	} else if ctx.Err() != nil {
		return nil, exit.With(exit.Busy, "%s: %w", path, context.Cause(ctx))
	}
	l, err := bindUnix(path)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return l, err // Also where there can't be a lock, since the directory is missing, say.
	}
	if err := removeStale(path, lockErr); err != nil {
		return nil, err
	}
	if l, err = bindUnix(path); errors.Is(err, syscall.EADDRINUSE) {
		err = inUse(path)
	}
	return l, err
}

func bindUnix(path string) (net.Listener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	file, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &socket{UnixListener: l, path: path, file: file}, nil
}

// removeStale removes a socket that nobody listens on, unless lockErr says that a server
// might just be starting with it. Anything else is left, and the error says what it is.
func removeStale(path string, lockErr error) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return notSocket(path, st.Mode())
	}
	nc, err := net.Dial("unix", path)
	switch {
	case err == nil:
		nc.Close()
		return inUse(path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("whether the socket %s is in use can't be told: %w", path, err)
	case !errors.Is(err, syscall.ECONNREFUSED):
		return inUse(path)
	case lockErr != nil:
		return fmt.Errorf("nobody listens on the socket %s, and it could not be locked: %w; remove it",
			path, lockErr)
	}
	return os.Remove(path)
}

// notSocket says what is in the way of a socket. That is a mistake on any machine: a
// server removes nothing that none has made.
func notSocket(path string, mode fs.FileMode) error {
	what := "a device"
	switch {
	case mode.IsRegular():
		what = "a regular file"
	case mode.IsDir():
		what = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		what = "a named pipe"
	case mode&fs.ModeSymlink != 0:
		target, _ := os.Readlink(path) // it may have gone
		what = "a symbolic link to " + target
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			what += ", which does not exist"
		}
	}
	return exit.Usagef("%s is %s; "+
		"name a path at which there is nothing, or the socket of a server that has ended", path, what)
}
