package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"
)

// A client is connected to an export. What it needs of the protocol is written out
// here: a test that took it from the server would agree with any mistake.
type client struct {
	nc   net.Conn
	size int64
}

// dial goes to where an NBD URI leads, read as strictly as its specification and
// RFC 3986 have it: "+" in a query is no space.
func dial(t testing.TB, uri string) *client {
	t.Helper()
	c, err := dialURI(uri)
	if err != nil {
		t.Fatalf("%s: %v", uri, err)
	}
	t.Cleanup(func() { c.nc.Close() })
	return c
}

func dialURI(uri string) (*client, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	network, address := "tcp", u.Host
	if u.Scheme == "nbd+unix" {
		network = "unix"
		for parameter := range strings.SplitSeq(u.RawQuery, "&") {
			if path, ok := strings.CutPrefix(parameter, "socket="); ok {
				if address, err = url.PathUnescape(path); err != nil {
					return nil, err
				}
			}
		}
	}
	nc, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	c := &client{nc: nc}
	if err := c.choose(strings.TrimPrefix(u.Path, "/")); err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

// choose asks for the export called name (NBD_OPT_GO).
func (c *client) choose(name string) error {
	if err := c.nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	greeting := make([]byte, 18) // NBDMAGIC, IHAVEOPT, flags
	if _, err := io.ReadFull(c.nc, greeting); err != nil {
		return err
	}
	b := append([]byte{0, 0, 0, 3}, "IHAVEOPT"...) // fixed newstyle, no zeroes
	b = binary.BigEndian.AppendUint32(b, 7)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(name)+2))
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	b = append(append(b, name...), 0, 0)
	if _, err := c.nc.Write(b); err != nil {
		return err
	}
	for {
		head := make([]byte, 20)
		if _, err := io.ReadFull(c.nc, head); err != nil {
			return err
		}
		data := make([]byte, binary.BigEndian.Uint32(head[16:]))
		if _, err := io.ReadFull(c.nc, data); err != nil {
			return err
		}
		switch kind := binary.BigEndian.Uint32(head[12:]); {
		case kind == 1: // NBD_REP_ACK
			return nil
		case kind == 3 && binary.BigEndian.Uint16(data) == 0: // NBD_REP_INFO, NBD_INFO_EXPORT
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
		case kind >= 1<<31:
			return fmt.Errorf("option reply %#x: %s", kind, data)
		}
	}
}

// do makes one request (0 reads, 1 writes) and returns the error number of the reply, or
// the data that were read.
func (c *client) do(op uint16, off int64, n int, data []byte) ([]byte, uint32, error) {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, op)
	b = binary.BigEndian.AppendUint64(b, 1)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	if _, err := c.nc.Write(append(b, data...)); err != nil {
		return nil, 0, err
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(c.nc, head); err != nil {
		return nil, 0, err
	}
	if errno := binary.BigEndian.Uint32(head[4:]); errno != 0 || op != 0 {
		return nil, errno, nil
	}
	p := make([]byte, n)
	_, err := io.ReadFull(c.nc, p)
	return p, 0, err
}
