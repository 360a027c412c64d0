// Package parcel passes JSON from one process to another over a Unix stream socket, each object
// with at most one descriptor. A parcel is the length of the object, 32 bits, big endian, and the
// object; the descriptor comes along with the length.
package parcel

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// Limit bounds an object, in bytes: what was received of a write and not executed can be 64 MiB,
// and takes a third more in JSON.
const Limit = 128 << 20

// Send sends an object, with a copy of f if that is not nil. It is for one caller at a time.
func Send(c *net.UnixConn, object any, f *os.File) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	if len(b) > Limit {
		return fmt.Errorf("an object of %d bytes is too long", len(b))
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(len(b)))
	if f == nil {
		_, err = c.Write(head)
	} else {
		err = SendFile(c, head, f)
	}
	if err == nil {
		_, err = c.Write(b)
	}
	return err
}

// Receive receives an object, and the descriptor that has come with it; nil: none has. It is for
// one caller at a time, and reads nothing beyond the object.
func Receive(c *net.UnixConn, object any) (f *os.File, err error) {
	in := &Reader{From: c}
	defer func() {
		if err != nil {
			in.Close()
		}
	}()
	var head [4]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, hungUp(err)
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > Limit {
		return nil, fmt.Errorf("an object of %d bytes is too long", length)
	}
	b, err := io.ReadAll(io.LimitReader(in, int64(length))) // It takes memory for what has come only.
	if err == nil && len(b) < int(length) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, hungUp(err)
	}
	if err := json.Unmarshal(b, object); err != nil {
		return nil, fmt.Errorf("what the other process says is not understood: %w", err)
	}
	return in.File, nil
}

// hungUp says what the end of a connection means. It is a reset where the other process has not
// read all that was sent.
func hungUp(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the other process has hung up: %w", io.ErrUnexpectedEOF)
	}
	return err
}
