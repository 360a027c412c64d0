package buse

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/nbdctl/nbdctl/backends"
)

var _ interface {
	backends.Backend
	io.WriterAt
	backends.Syncer
	backends.Trimmer
	io.Closer
} = (*Backend)(nil)

// A Driver has the methods that buse-go asks of a driver. Offsets and lengths are in bytes.
type Driver interface {
	// ReadAt fills all of p, or returns an error.
	ReadAt(p []byte, off uint) error
	// WriteAt stores all of p, or returns an error.
	WriteAt(p []byte, off uint) error
	// Disconnect is the last call.
	Disconnect()
	// Flush makes all earlier writes durable.
	Flush() error
	// Trim is told that a range is no longer needed. It may do nothing.
	Trim(off, length uint) error
}

// A Backend is a Driver by the rules of package backends. All its methods may be called
// concurrently. The errors of the driver are returned as they are.
type Backend struct {
	driver     Driver
	size       int64
	concurrent bool // the driver keeps the rules of package backends

	turn   sync.Mutex // held during each call of the driver, unless concurrent
	closed atomic.Bool
}

// New makes a backend of size bytes that treats d as buse-go does: one call at a time, each with a
// buffer of its own, that of a read full of zeros.
//
// The offsets of a Driver are of type uint. On a machine on which that has 32 bits, a size of 4 GiB
// and more is an error.
func New(d Driver, size int64) (*Backend, error) { return newBackend(d, size, false) }

// NewConcurrent is New for a driver that keeps the rules of package backends: its methods may be
// called concurrently, ReadAt fills all of p, WriteAt does not change p, and p is not used after
// the return. Requests cost neither a lock nor a copy then. Close may call Disconnect while other
// methods run.
func NewConcurrent(d Driver, size int64) (*Backend, error) { return newBackend(d, size, true) }

func newBackend(d Driver, size int64, concurrent bool) (*Backend, error) {
	switch {
	case d == nil:
		return nil, errors.New("buse: no driver")
	case size < 0:
		return nil, fmt.Errorf("buse: size %d: negative: %w", size, fs.ErrInvalid)
	case int64(uint(size)) != size:
		return nil, fmt.Errorf("buse: size %d: above %d, the last offset that a driver knows on this machine: %w",
			size, ^uint(0), fs.ErrInvalid)
	}
	return &Backend{driver: d, size: size, concurrent: concurrent}, nil
}

// Size returns the size in bytes.
func (b *Backend) Size() int64 { return b.size }

// ReadAt implements io.ReaderAt.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	var end error
	if off >= 0 && int64(len(p)) > b.size-off {
		p, end = p[:max(b.size-off, 0)], io.EOF
		off = min(off, b.size)
	}
	err := b.call(off, int64(len(p)), func() error {
		if b.concurrent {
			return b.driver.ReadAt(p, uint(off))
		}
		own := make([]byte, len(p))
		err := b.driver.ReadAt(own, uint(off))
		copy(p, own)
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(p), end
}

// WriteAt implements io.WriterAt.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	err := b.call(off, int64(len(p)), func() error {
		if b.concurrent {
			return b.driver.WriteAt(p, uint(off))
		}
		own := make([]byte, len(p))
		copy(own, p)
		return b.driver.WriteAt(own, uint(off))
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Trim implements backends.Trimmer.
func (b *Backend) Trim(off, n int64) error {
	return b.call(off, n, func() error { return b.driver.Trim(uint(off), uint(n)) })
}

// call calls the driver for a range, unless that is empty.
func (b *Backend) call(off, n int64, f func() error) error {
	if off < 0 || n < 0 || off > b.size-n {
		return fmt.Errorf("buse: %d bytes at %d are not inside the %d bytes of the device: %w",
			n, off, b.size, syscall.ENOSPC)
	}
	if n == 0 {
		return nil
	}
	return b.inTurn(f)
}

// Sync implements backends.Syncer by the driver's Flush.
func (b *Backend) Sync() error { return b.inTurn(b.driver.Flush) }

// inTurn calls f when no other call of the driver runs. The turn ends also with a panic of f.
func (b *Backend) inTurn(f func() error) error {
	if !b.concurrent {
		b.turn.Lock()
		defer b.turn.Unlock()
	}
	if b.closed.Load() {
		return fs.ErrClosed
	}
	return f()
}

// Close calls the driver's Disconnect, once. It does not flush; a server does, when its client asks
// for it. Later calls of all methods but Size fail with fs.ErrClosed.
func (b *Backend) Close() error {
	return b.inTurn(func() error {
		if b.closed.Swap(true) {
			return fs.ErrClosed
		}
		b.driver.Disconnect()
		return nil
	})
}
