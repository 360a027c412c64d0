//go:build !linux

package parcel

import (
	"errors"
	"io"
	"net"
	"os"
)

// A Reader is for Linux; elsewhere no descriptor comes along.
type Reader struct {
	From io.Reader
	File *os.File
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) { return r.From.Read(p) }

// Close is for Linux.
func (r *Reader) Close() {}

// SendFile is for Linux.
func SendFile(net.Conn, []byte, *os.File) error { return errors.ErrUnsupported }
