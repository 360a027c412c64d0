package parcel

import (
	"errors"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A Reader reads from a connection, and keeps the first descriptor that comes along.
type Reader struct {
	From io.Reader
	File *os.File // nil: none has come
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	c, ok := r.From.(*net.UnixConn)
	if !ok || len(p) == 0 {
		return r.From.Read(p)
	}
	oob := make([]byte, unix.CmsgSpace(4)) // The kernel drops what is too much.
	n, oobn, _, _, err := c.ReadMsgUnix(p, oob)
	messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i]) // Other messages have none.
		for _, fd := range fds {
			f := os.NewFile(uintptr(fd), "received")
			if r.File != nil {
				f.Close()
				continue
			}
			r.File = f
		}
	}
	if n == 0 && (err == nil || errors.Is(err, io.EOF)) {
		err = io.EOF // and nothing around it
	}
	return max(n, 0), err // It is -1 with some errors.
}

// Close closes the descriptor. The connection stays open.
func (r *Reader) Close() {
	if r.File != nil {
		r.File.Close()
	}
}

// SendFile writes b, which is not empty, to a connection, with a copy of f.
func SendFile(c net.Conn, b []byte, f *os.File) error {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var n int
		if n, _, failed = u.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil); failed == nil && n < len(b) {
			_, failed = u.Write(b[n:])
		}
	})
	return errors.Join(err, failed)
}
