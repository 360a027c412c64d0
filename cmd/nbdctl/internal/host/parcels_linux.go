package host

import (
	"errors"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// parcels reads from a connection, and keeps the first descriptor that comes along.
type parcels struct {
	from io.Reader
	file *os.File
}

func (p *parcels) Read(b []byte) (int, error) {
	c, ok := p.from.(*net.UnixConn)
	if !ok || len(b) == 0 {
		return p.from.Read(b)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob) // The kernel closes what is too much.
	messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i]) // Other messages have none.
		for _, fd := range fds {
			f := os.NewFile(uintptr(fd), "received")
			if p.file != nil {
				f.Close()
				continue
			}
			p.file = f
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// close closes the descriptor.
func (p *parcels) close() { _ = closeFile(p.file) }

// sendParcel writes b to a connection, with a copy of a descriptor.
func sendParcel(c net.Conn, b []byte, f *os.File) error {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return errors.ErrUnsupported
	}
	return withDescriptor(f, func(fd uintptr) error {
		n, _, err := u.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil)
		if err == nil && n < len(b) {
			_, err = u.Write(b[n:])
		}
		return err
	})
}
