package server_test

import (
	"fmt"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// A disk is a backend in memory that can do everything, remembers what it was asked, and fails or
// waits when told to.
type disk struct {
	// before, if set, runs at the start of each call, outside the lock; an error from it is the
	// result of the call.
	before func(op string, off, n int64) error

	mu    sync.Mutex // guards the two below
	data  []byte
	calls []string
}

func newDisk(size int) *disk { return &disk{data: make([]byte, size)} }

// call notes the call, runs before, and then do under the lock.
func (d *disk) call(op string, off, n int64, do func()) error {
	d.mu.Lock()
	d.calls = append(d.calls, fmt.Sprintf("%s %d+%d", op, off, n))
	d.mu.Unlock()
	if d.before != nil {
		if err := d.before(op, off, n); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	do()
	return nil
}

// history returns the calls so far and forgets them.
func (d *disk) history() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = nil
	return calls
}

func (d *disk) Size() int64 { return int64(len(d.data)) }

func (d *disk) ReadAt(p []byte, off int64) (n int, err error) {
	err = d.call("read", off, int64(len(p)), func() { n = copy(p, d.data[off:]) })
	return n, err
}

func (d *disk) WriteAt(p []byte, off int64) (n int, err error) {
	err = d.call("write", off, int64(len(p)), func() { n = copy(d.data[off:], p) })
	return n, err
}

func (d *disk) WriteAtFUA(p []byte, off int64) (n int, err error) {
	err = d.call("write-fua", off, int64(len(p)), func() { n = copy(d.data[off:], p) })
	return n, err
}

func (d *disk) Sync() error { return d.call("sync", 0, 0, func() {}) }

func (d *disk) Trim(off, n int64) error {
	return d.call("trim", off, n, func() { clear(d.data[off : off+n]) })
}

func (d *disk) Zero(off, n int64, flags backends.ZeroFlags) error {
	op := "zero"
	if flags&backends.ZeroNoHole != 0 {
		op = "zero-no-hole"
	}
	return d.call(op, off, n, func() { clear(d.data[off : off+n]) })
}

// plain is a disk with the methods of a 20-line backend: no FUA, no zeroes, and Sync and Trim
// hidden as capped says.
type plain struct {
	disk   *disk
	capped backends.Caps
}

func (p plain) Size() int64                              { return p.disk.Size() }
func (p plain) ReadAt(b []byte, off int64) (int, error)  { return p.disk.ReadAt(b, off) }
func (p plain) WriteAt(b []byte, off int64) (int, error) { return p.disk.WriteAt(b, off) }
func (p plain) Sync() error                              { return p.disk.Sync() }
func (p plain) Trim(off, n int64) error                  { return p.disk.Trim(off, n) }
func (p plain) Caps() backends.Caps                      { return p.capped }

var (
	_ interface {
		backends.Backend
		backends.FUAWriter
		backends.Syncer
		backends.Trimmer
		backends.Zeroer
	} = (*disk)(nil)
	_ backends.Capper = plain{}
)
