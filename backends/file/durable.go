package file

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// A durable makes syncs of one file trustworthy. The kernel hands out an error of
// write-back once for each open file: of two syncs at the same time, which both
// cover the lost data, one fails and the other succeeds. So there is never more
// than one at a time, and the first error stays.
type durable struct {
	rounds atomic.Uint64 // how many syncs have begun

	mu    sync.Mutex // held during a sync; guards the rest
	err   error      // of the first that failed
	noFUA bool       // the kernel or the file system cannot do it
}

// sync returns when a sync that began after the call is over. Callers that come
// while one is running share the next.
func (d *durable) sync(sync func() error) error {
	next := d.rounds.Load() + 1 // the first to begin from now on
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil && d.rounds.Load() < next {
		d.rounds.Add(1)
		d.err = sync()
	}
	return d.err
}

// unshared is sync for a sync that no other call shares.
func (d *durable) unshared(sync func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.rounds.Add(1)
		d.err = sync()
	}
	return d.err
}

// Sync implements backends.Syncer. After an error it fails with that error for
// good: see the package documentation.
func (f *File) Sync() error {
	return f.durable.sync(f.datasync)
}

func (f *File) datasync() error {
	if err := f.sync(); err != nil {
		return fmt.Errorf("file: %s: sync: %w", f.path, err)
	}
	return nil
}

// WriteAtFUA implements backends.FUAWriter.
func (f *File) WriteAtFUA(p []byte, off int64) (int, error) {
	if err := f.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	d := &f.durable
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return 0, d.err
	}
	var fua error
	if !d.noFUA {
		if _, fua = f.direct.write(p, off, f.writeDurably); fua == nil {
			return len(p), nil
		}
		if d.noFUA = errors.Is(fua, errors.ErrUnsupported); d.noFUA {
			fua = nil
		}
	}
	// One error stands for both halves of a durable write. Writing again tells
	// them apart: if that works, it was the sync that failed.
	n, err := f.WriteAt(p, off)
	if err != nil {
		return n, err
	}
	if fua != nil {
		d.err = fmt.Errorf("file: %s: durable write: %w", f.path, fua)
	} else {
		d.err = f.datasync()
	}
	if d.err != nil {
		return 0, d.err
	}
	return n, nil
}
