package doctor

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server"
)

// links are connections that are served, and their other ends.
type links struct {
	kernel []syscall.Conn
	ends   []net.Conn // both ends of all
	conns  []*server.Conn
	served chan error
	memory *memory.Memory
}

// serveUnix serves n pairs of Unix sockets.
func serveUnix(n, blockSize int) (*links, error) {
	pairs := make([][2]net.Conn, n)
	for i := range pairs {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return nil, errors.Join(err, closePairs(pairs))
		}
		for j, fd := range fds {
			f := os.NewFile(uintptr(fd), "nbd")
			c, err := net.FileConn(f)
			if err = errors.Join(err, f.Close()); err != nil {
				return nil, errors.Join(err, closePairs(pairs))
			}
			pairs[i][j] = c
		}
	}
	return serve(pairs, blockSize)
}

// serveTCP serves a connection over the loopback interface.
func serveTCP() (*links, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	var pair [2]net.Conn
	if pair[1], err = net.Dial("tcp", l.Addr().String()); err == nil {
		pair[0], err = l.Accept()
	}
	if err != nil {
		return nil, errors.Join(err, closePairs([][2]net.Conn{pair}))
	}
	return serve([][2]net.Conn{pair}, 512)
}

// serve serves memory over the first of each pair.
func serve(pairs [][2]net.Conn, blockSize int) (*links, error) {
	m, err := memory.New(deviceSize, memory.Options{})
	if err != nil {
		return nil, errors.Join(err, closePairs(pairs))
	}
	export, err := server.NewExport(m, server.Options{BlockSize: blockSize})
	if err != nil {
		return nil, errors.Join(err, m.Close(), closePairs(pairs))
	}
	l := &links{memory: m, served: make(chan error, len(pairs))}
	for _, p := range pairs {
		l.ends = append(l.ends, p[0], p[1])
		l.kernel = append(l.kernel, p[1].(syscall.Conn)) // as all that come from the net package are
		conn := export.NewConn(p[0], nil)
		l.conns = append(l.conns, conn)
		go func() { l.served <- conn.Transmit() }()
	}
	return l, nil
}

// close cuts the connections and waits for those who serve them.
func (l *links) close() error {
	for _, e := range l.ends {
		_ = e.Close() // nobody speaks any more
	}
	for _, c := range l.conns {
		_ = c.Close() // likewise
		<-l.served
	}
	return l.memory.Close()
}

func closePairs(pairs [][2]net.Conn) error {
	var errs []error
	for _, p := range pairs {
		for _, c := range p {
			if c != nil {
				errs = append(errs, c.Close())
			}
		}
	}
	return errors.Join(errs...)
}
