package main

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// A bare contender gives the kernel its command and reads the answer, and does nothing else. The
// numbers are of linux/nbd-netlink.h.
type bare struct {
	family uint16
	mu     sync.Mutex // guards free
	free   []*genetlink.Conn
}

func newBare() (*bare, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, err
	}
	f, err := c.GetFamily("nbd")
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &bare{family: f.ID, free: []*genetlink.Conn{c}}, nil
}

func (b *bare) name() string       { return "bare" }
func (b *bare) able(int, int) bool { return true }

func (b *bare) connect(_ context.Context, i, connections int) (func() error, time.Duration, error) {
	index := uint32(bareIndex + i)
	conn, err := b.take()
	if err != nil {
		return nil, 0, err
	}
	defer b.put(conn)
	ends := make([]int, 0, 2*connections)
	closeEnds := func() (err error) {
		for _, fd := range ends {
			err = errors.Join(err, syscall.Close(fd))
		}
		return err
	}
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(1, index)           // NBD_ATTR_INDEX
	ae.Uint64(2, deviceSize)      // NBD_ATTR_SIZE_BYTES
	ae.Uint64(3, 512)             // NBD_ATTR_BLOCK_SIZE_BYTES
	ae.Uint64(4, 30)              // NBD_ATTR_TIMEOUT
	ae.Uint64(5, 1|4|8|32|64|256) // NBD_ATTR_SERVER_FLAGS, as nbdctl's for memory
	ae.Uint64(8, 0)               // NBD_ATTR_DEAD_CONN_TIMEOUT
	ae.String(10, "bare:device")  // NBD_ATTR_BACKEND_IDENTIFIER
	ae.Nested(7, func(list *netlink.AttributeEncoder) error {
		for range connections {
			pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			ends = append(ends, pair[:]...)
			list.Nested(1, func(item *netlink.AttributeEncoder) error {
				item.Uint32(1, uint32(pair[0]))
				return nil
			})
		}
		return nil
	})
	attrs, err := ae.Encode()
	if err != nil {
		return nil, 0, errors.Join(err, closeEnds())
	}
	request := genetlink.Message{Header: genetlink.Header{Command: 1, Version: 1}, Data: attrs}
	began := time.Now()
	_, err = conn.Execute(request, b.family, netlink.Request)
	took := time.Since(began)
	if err != nil {
		return nil, 0, errors.Join(err, closeEnds())
	}
	return func() error { return errors.Join(b.disconnect(index), closeEnds()) }, took, nil
}

func (b *bare) disconnect(index uint32) error {
	conn, err := b.take()
	if err != nil {
		return err
	}
	defer b.put(conn)
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(1, index)
	attrs, err := ae.Encode()
	if err != nil {
		return err
	}
	_, err = conn.Execute(genetlink.Message{Header: genetlink.Header{Command: 2, Version: 1}, Data: attrs}, b.family,
		netlink.Request|netlink.Acknowledge)
	return err
}

func (b *bare) take() (*genetlink.Conn, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.free); n > 0 {
		c := b.free[n-1]
		b.free = b.free[:n-1]
		return c, nil
	}
	return genetlink.Dial(nil)
}

func (b *bare) put(c *genetlink.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free = append(b.free, c)
}
