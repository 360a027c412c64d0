package blockdev_test

import (
	"sync/atomic"
)

// A recorder is a disk that counts what only a backend sees, and fails or waits when told to.
type recorder struct {
	disk
	syncs, fuas, trims atomic.Int64
	before             atomic.Pointer[func(op string, off int64) error]
}

func newRecorder(size int) *recorder { return &recorder{disk: disk{data: make([]byte, size)}} }

// stored returns what the backend has of n bytes at off, asked by nobody but the test.
func (r *recorder) stored(off, n int64) []byte {
	p := make([]byte, n)
	r.disk.ReadAt(p, off)
	return p
}

func (r *recorder) hook(op string, off int64) error {
	if f := r.before.Load(); f != nil {
		return (*f)(op, off)
	}
	return nil
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	if err := r.hook("read", off); err != nil {
		return 0, err
	}
	return r.disk.ReadAt(p, off)
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := r.hook("write", off); err != nil {
		return 0, err
	}
	return r.disk.WriteAt(p, off)
}

func (r *recorder) WriteAtFUA(p []byte, off int64) (int, error) {
	r.fuas.Add(1)
	return r.WriteAt(p, off)
}

func (r *recorder) Sync() error {
	r.syncs.Add(1)
	return r.hook("sync", 0)
}

func (r *recorder) Trim(off, n int64) error {
	r.trims.Add(1)
	return r.disk.Trim(off, n)
}
