package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Open opens the file at path and locks it. Its errors match fs.ErrNotExist,
// fs.ErrPermission, syscall.EROFS (a *ReadOnlyError if the file is there), ErrNotDisk and
// ErrLocked, or are a *SizeError or a *NoLocksError.
// When it fails, no file has been created or changed.
func Open(path string, opts Options) (*File, error) {
	if err := opts.check(path); err != nil {
		return nil, err
	}
	f := &File{path: path}
	var err error
	if f.f, err = openExisting(path, opts.ReadOnly); errors.Is(err, fs.ErrNotExist) && opts.Create {
		err = f.create(opts.Size)
	}
	if err != nil {
		return nil, err
	}
	if err := f.setUp(opts); err != nil {
		return nil, errors.Join(err, f.Discard())
	}
	// Who had it locked before may have been removing it.
	if same, err := f.isAt(path); !same {
		err = fmt.Errorf("file: %s was removed in the moment of opening it: %w", path, errors.Join(fs.ErrNotExist, err))
		return nil, errors.Join(err, f.Discard())
	}
	return f, nil
}

func openExisting(path string, readOnly bool) (*os.File, error) {
	// Looking first, since opening a pipe would wait for its other end, and
	// opening some devices does something to them.
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	if err := checkMode(path, st.Mode()); err != nil {
		return nil, err
	}
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	} else if isBlock(st.Mode()) {
		flag |= os.O_EXCL // the kernel's claim on a device: no mount, no other writer
	}
	f, err := os.OpenFile(path, flag, 0)
	if errors.Is(err, syscall.EBUSY) {
		return nil, &LockedError{Path: path, Holders: openers(st)}
	}
	if err != nil && !readOnly {
		return nil, refused(path, isBlock(st.Mode()), err)
	}
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	return f, nil
}

// create makes an empty file, which is to be locked before it gets its size: so
// whoever else opens it meanwhile finds either the lock or a wrong size, and
// never a file that its maker may yet remove.
func (f *File) create(size int64) (err error) {
	if size == 0 {
		return fmt.Errorf("file: %s: %w, and no size to create it with", f.path, fs.ErrNotExist)
	}
	abs, err := filepath.Abs(f.path) // the process may change directory
	if err != nil {
		return fmt.Errorf("file: %s: %w", f.path, err)
	}
	// A disk holds anybody's secrets, so it starts as its owner's alone.
	if f.f, err = os.OpenFile(abs, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return fmt.Errorf("file: %w", err)
	}
	f.created = abs
	return nil
}

// extend gives a created file its size, and makes it and its name durable: a
// Sync of its content would be worth nothing without the name.
func (f *File) extend(size int64) error {
	if err := f.f.Truncate(size); err != nil {
		return fmt.Errorf("file: %s: %w", f.path, tooLong(err, size))
	}
	if err := f.f.Sync(); err != nil {
		return fmt.Errorf("file: %w", err)
	}
	dir, err := os.Open(filepath.Dir(f.created))
	if err != nil {
		return fmt.Errorf("file: %w", err)
	}
	defer dir.Close()
	// EINVAL: this file system has no way to sync a directory, and no need.
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("file: %w", err)
	}
	return nil
}

// Created reports whether Open made the file.
func (f *File) Created() bool { return f.created != "" }

// Discard is Close for who could not go on after Open: it also removes the file if
// Open made it.
func (f *File) Discard() error {
	var err error
	if f.created != "" {
		// While the lock is still ours, and unless another file has the name now.
		if same, _ := f.isAt(f.created); same {
			err = os.Remove(f.created)
		}
	}
	return errors.Join(err, f.Close())
}

// isAt tells whether path is the open file.
func (f *File) isAt(path string) (bool, error) {
	ours, err := f.f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return os.SameFile(ours, there), nil
}
