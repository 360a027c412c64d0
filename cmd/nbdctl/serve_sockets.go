package main

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/vsock"
)

// fileOf returns a copy of the descriptor of a listener, or of a connection.
func fileOf(socket any) (*os.File, error) {
	if s, ok := socket.(interface{ File() (*os.File, error) }); ok {
		return s.File()
	}
	if s, ok := socket.(interface{ Copy() (*os.File, error) }); ok {
		return s.Copy()
	}
	if s, ok := socket.(*vsock.Conn); ok {
		return duplicate(s)
	}
	return nil, fmt.Errorf("a %T can't be handed over: %w", socket, errors.ErrUnsupported)
}

// heldOf tells of a listener what its descriptor does not.
func heldOf(l net.Listener) heldListener {
	h := heldListener{Network: l.Addr().Network()}
	if s, ok := l.(*socket); ok && s.own() {
		h.Path = s.path
	}
	return h
}

// keepFile has the file of a socket stay when that is closed here.
func keepFile(l net.Listener) {
	if s, ok := l.(*socket); ok {
		s.keep()
	}
}

// listener makes a listener of a descriptor, which is closed.
func (h heldListener) listener(f *os.File) (net.Listener, error) {
	if h.Network == "vsock" {
		return vsockListenerOf(f)
	}
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return l, nil
	}
	u.SetUnlinkOnClose(false)
	if h.Path == "" {
		return u, nil
	}
	file, err := os.Lstat(h.Path)
	if err != nil {
		return u, nil // Somebody has just removed it.
	}
	return &socket{UnixListener: u, path: h.Path, file: file}, nil
}

// conn makes a connection of a descriptor, which is closed.
func (h heldClient) conn(f *os.File) (net.Conn, error) {
	if h.Network == "vsock" {
		return vsockConnOf(f)
	}
	nc, err := net.FileConn(f)
	return nc, errors.Join(err, f.Close())
}
