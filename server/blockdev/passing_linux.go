package blockdev

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// sendFiles sends copies of descriptors along with a byte.
func sendFiles(c *net.UnixConn, files []*os.File) error {
	fds := make([]int, len(files))
	// Fd would have who shares the open file block, which is the connections' own affair.
	var send func(i int) error
	send = func(i int) error {
		if i == len(files) {
			_, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil)
			return err
		}
		raw, err := files[i].SyscallConn()
		if err != nil {
			return err
		}
		sent := error(nil)
		if err := raw.Control(func(fd uintptr) {
			fds[i] = int(fd)
			sent = send(i + 1)
		}); err != nil {
			return err
		}
		return sent
	}
	return send(0)
}

// receiveFiles receives what one call of sendFiles has sent. They are closed at an exec.
func receiveFiles(c *net.UnixConn) ([]*os.File, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*rightsPerMessage))
	n, oobn, flags, _, err := c.ReadMsgUnix(b[:], oob)
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	messages, parse := unix.ParseSocketControlMessage(oob[:oobn])
	err = errors.Join(err, parse)
	var files []*os.File
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i]) // Other messages have none.
		for _, fd := range fds {
			name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if err != nil {
				name = "handed over"
			}
			files = append(files, os.NewFile(uintptr(fd), name))
		}
	}
	if flags&unix.MSG_CTRUNC != 0 {
		err = errors.Join(err, errors.New("descriptors were lost: this process may have no more"))
	}
	return files, err
}
