package file

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/nbdctl/nbdctl/backends"
)

// measure sets the size, and refuses a wrong one.
func (f *File) measure(opts Options) error {
	f.unit = int64(max(opts.BlockSize, 1))
	size, err := f.length()
	if err != nil {
		return err
	}
	f.set(size)
	if f.size.Load() == 0 && !opts.AllowEmpty || opts.Size > 0 && opts.Size != size {
		return &SizeError{Path: f.path, Have: size, Want: opts.Size, BlockSize: opts.BlockSize}
	}
	return nil
}

// length asks how long the file is, in bytes.
func (f *File) length() (int64, error) {
	size, err := f.f.Seek(0, io.SeekEnd) // which holds for block devices too
	if err != nil {
		return 0, fmt.Errorf("file: %w", err)
	}
	return size, nil
}

// set takes what there is in whole blocks for the device.
func (f *File) set(length int64) {
	f.tail.Store(length % f.unit)
	f.size.Store(length - length%f.unit)
}

// Size returns the size in bytes, without the tail. A block device and a file that
// is read-only may grow behind the device's back, and Size then tells of it.
func (f *File) Size() int64 {
	if f.caps&backends.CapResize == 0 {
		f.measuring.Lock()
		defer f.measuring.Unlock()
		if length, err := f.length(); err == nil && length-length%f.unit > f.size.Load() {
			f.set(length)
		}
	}
	return f.size.Load()
}

// Tail returns how many bytes at the end of the file are left out, because they
// make no whole block.
func (f *File) Tail() int64 { return f.tail.Load() }

// Resize implements backends.Resizer for regular files that can be written; the
// size of a block device is somebody else's. It is durable when Resize returns.
//
// A tail is in the way of what is added, which is to be zeros, and it is not the
// device's to overwrite: growing fails with a *TailError then. It is lost with what
// is cut off.
//
// If somebody else has changed the file's length, the error is a *SizeError and
// nothing has been done; unless that is the size which is asked for, which then is
// taken as it is, with what it contains, or only the tail is gone.
func (f *File) Resize(size int64) error {
	switch {
	case f.caps&backends.CapResize == 0:
		return fmt.Errorf("file: %s: resize: %w", f.path, errors.ErrUnsupported)
	case size < 1 || size%f.unit != 0:
		return fmt.Errorf("file: %s: size %d is not a positive multiple of %d: %w", f.path, size, f.unit, fs.ErrInvalid)
	}
	f.measuring.Lock()
	defer f.measuring.Unlock()
	length, err := f.length()
	if err != nil {
		return err
	}
	switch old, tail := f.size.Load(), f.tail.Load(); {
	case length == size: // Somebody else has made it so, or a Resize that could not sync.
		if err := f.durable.unshared(f.syncAll); err != nil {
			return err
		}
	case length != old && length != old+tail:
		return &SizeError{Path: f.path, Have: length, Want: old + tail, BlockSize: int(f.unit)}
	case size == old:
		return nil
	case size > old && length > old:
		return &TailError{Path: f.path, Have: length, BlockSize: int(f.unit)}
	default:
		if err := f.truncate(old, size); err != nil {
			return err
		}
	}
	f.set(size)
	return nil
}

// truncate makes the file shorter or longer, which adds zeros.
func (f *File) truncate(old, size int64) error {
	err := f.f.Truncate(size)
	if err == nil {
		err = f.durable.unshared(f.syncAll)
	}
	if err == nil {
		return nil
	}
	if size > old {
		err = errors.Join(err, f.f.Truncate(old))
	}
	return fmt.Errorf("file: %s: resize: %w", f.path, tooLong(err, size))
}

// syncAll makes the length durable, too.
func (f *File) syncAll() error {
	if err := f.f.Sync(); err != nil {
		return fmt.Errorf("file: %s: sync: %w", f.path, err)
	}
	return nil
}
