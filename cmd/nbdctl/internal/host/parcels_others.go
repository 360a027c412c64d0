//go:build !linux

package host

import (
	"errors"
	"io"
	"net"
	"os"
)

// parcels is for Linux.
type parcels struct {
	from io.Reader
	file *os.File
}

func (p *parcels) Read(b []byte) (int, error) { return p.from.Read(b) }
func (p *parcels) close()                     {}

func sendParcel(net.Conn, []byte, *os.File) error { return errors.ErrUnsupported }
