package server_test

import (
	"io"
	"net"
	"testing"

	"github.com/nbdctl/nbdctl/server"
)

// A vsockLike is a listener whose connections are said to be over vsock.
type vsockLike struct{ net.Listener }

func (l vsockLike) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return vsockLikeConn{nc.(*net.UnixConn)}, nil
}

type vsockLikeConn struct{ *net.UnixConn }

func (vsockLikeConn) RemoteAddr() net.Addr { return vsockLikeAddr{} }

type vsockLikeAddr struct{}

func (vsockLikeAddr) Network() string { return "vsock" }
func (vsockLikeAddr) String() string  { return "host(2):1" }

// TestVsockHangsUp has a client end its side of a connection first, over vsock, although it has
// said that it goes: until then its socket is open at the other end.
func TestVsockHangsUp(t *testing.T) {
	s := &server.Server{Exports: map[string]*server.Export{"x": export(t, newDisk(4096), server.Options{})}}
	l := listenOn(t, "unix")
	serveOn(t, s, vsockLike{l})
	nc := clientOf(t, l, "x")
	if _, err := nc.Write(call{op: cmdDisc}.encode(1)); err != nil {
		t.Fatal(err)
	}
	if n, err := nc.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if _, err := nc.Write([]byte("x")); err != nil { // EPIPE, if it was closed
		t.Errorf("the connection was closed: %v", err)
	}
}
