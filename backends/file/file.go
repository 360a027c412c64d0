// Package file is a block device in a regular file or on another block device.
package file

import (
	"errors"
	"os"
)

// Options of Open and New.
type Options struct {
	ReadOnly  bool
	Create    bool  // make the file, of Size bytes, if there is none
	Size      int64 // bytes; must match exactly an existing file; 0: as it is
	BlockSize int   // bytes; a tail below it is left out; 0: none is
}

var (
	ErrLocked  = errors.New("file: locked")
	ErrNotDisk = errors.New("file: neither a regular file nor a block device")
)

// A Holder is a process that keeps a file locked.
type Holder struct {
	PID  int
	Comm string
}

// A LockedError says who holds the file. It matches ErrLocked.
type LockedError struct {
	Path    string
	Holders []Holder // as far as they can be found
}

func (e *LockedError) Error() string        { return e.Path }
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// A SizeError says that a file is not of the size asked for.
type SizeError struct {
	Path       string
	Have, Want int64 // bytes
}

func (e *SizeError) Error() string { return e.Path }

// File is a block device in a file.
type File struct{ f *os.File }

func Open(path string, opts Options) (*File, error)           { return nil, errors.ErrUnsupported }
func New(f *os.File, opts Options) (*File, error)             { return nil, errors.ErrUnsupported }
func (f *File) Size() int64                                   { return 0 }
func (f *File) Tail() int64                                   { return 0 }     // bytes at the end left out for the block size
func (f *File) Created() bool                                 { return false } // Open made the file
func (f *File) Discard() error                                { return nil }   // Close, and remove the file if Open made it
func (f *File) Close() error                                  { return nil }
func (f *File) ReadAt(p []byte, off int64) (n int, err error) { return 0, errors.ErrUnsupported }
