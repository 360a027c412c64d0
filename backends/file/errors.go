package file

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strings"
)

var (
	// ErrNotDisk is the error for a path that can hold no disk image: a
	// directory, a pipe, a terminal.
	ErrNotDisk = errors.New("neither a regular file nor a block device")

	// ErrLocked is what a LockedError matches.
	ErrLocked = errors.New("in use: mounted, or held by another program")
)

// A LockedError says that somebody else has the file locked, or the block device
// open exclusively. It matches ErrLocked.
type LockedError struct {
	Path    string
	Holders []Holder // those that can be found; none if it is mounted, or the kernel's
	Swap    bool     // the kernel swaps to it
}

// A Holder is a process that holds a file.
type Holder struct {
	PID  int
	Comm string // its name, at most 15 bytes
}

func (e *LockedError) Error() string {
	by := make([]string, len(e.Holders))
	for i, h := range e.Holders {
		by[i] = fmt.Sprintf("%s (pid %d)", h.Comm, h.PID)
	}
	switch {
	case e.Swap:
		return fmt.Sprintf("file: %s: in use as swap space", e.Path)
	case len(by) == 0:
		return fmt.Sprintf("file: %s: %v", e.Path, ErrLocked)
	}
	return fmt.Sprintf("file: %s: in use by %s", e.Path, strings.Join(by, ", "))
}

// Is reports whether target is ErrLocked.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// A NoLocksError says that the file system, or the machine, has no locks that would keep
// others away from a file. Options.NoLock does without. It matches errors.ErrUnsupported,
// and what the kernel has said.
type NoLocksError struct {
	Path string
	Err  error // of the kernel
}

func (e *NoLocksError) Error() string {
	return fmt.Sprintf("file: %s: its file system has no locks (%v), so that others could write it at the same time",
		e.Path, e.Err)
}

// Is reports whether target is errors.ErrUnsupported.
func (e *NoLocksError) Is(target error) bool { return target == errors.ErrUnsupported }

// Unwrap returns what the kernel has said.
func (e *NoLocksError) Unwrap() error { return e.Err }

// A SizeError says that a file does not have the size that was asked for, or too
// few bytes for any. Nothing has been done to it.
type SizeError struct {
	Path      string
	Have      int64 // bytes
	Want      int64 // bytes; 0: at least one block
	BlockSize int   // bytes; 0: none
}

func (e *SizeError) Error() string {
	switch {
	case e.Want > 0:
		return fmt.Sprintf("file: %s: its size is %d bytes, not %d", e.Path, e.Have, e.Want)
	case e.Have > 0:
		return fmt.Sprintf("file: %s: its size of %d bytes is less than a block of %d", e.Path, e.Have, e.BlockSize)
	}
	return fmt.Sprintf("file: %s: it is empty", e.Path)
}

// A TailError says that a file can't grow, because the bytes at its end that make no
// whole block would be lost. Nothing has been done to it.
type TailError struct {
	Path      string
	Have      int64 // bytes
	BlockSize int   // bytes
}

func (e *TailError) Error() string {
	unit := int64(e.BlockSize)
	tail := e.Have % unit
	whole := e.Have - tail
	s := fmt.Sprintf(
		"file: %s: it can't grow: the last %d of its %d bytes are less than a block of %d, "+
			"are not part of the device, and would be lost; cut them off first (truncate -s %d)",
		e.Path, tail, e.Have, e.BlockSize, whole,
	)
	if whole > math.MaxInt64-unit {
		return s
	}
	return s + fmt.Sprintf(", or make the block whole (truncate -s %d) and resize to that", whole+unit)
}

// A DirectError says that a file cannot be read and written past the page cache, as
// Options.Direct asks for. It matches errors.ErrUnsupported.
type DirectError struct {
	Path   string
	Reason string
}

func (e *DirectError) Error() string {
	return fmt.Sprintf("file: %s: no direct I/O: %s", e.Path, e.Reason)
}

// Is reports whether target is errors.ErrUnsupported.
func (e *DirectError) Is(target error) bool { return target == errors.ErrUnsupported }

// checkMode accepts what can hold a disk image.
func checkMode(path string, mode fs.FileMode) error {
	var is string
	switch {
	case mode.IsRegular(), isBlock(mode):
		return nil
	case mode.IsDir():
		is = "directory"
	case mode&fs.ModeNamedPipe != 0:
		is = "named pipe"
	case mode&fs.ModeSocket != 0:
		is = "socket"
	case mode&fs.ModeCharDevice != 0:
		is = "character device"
	default:
		is = "file of type " + mode.Type().String()
	}
	return fmt.Errorf("file: %s: a %s, %w", path, is, ErrNotDisk)
}

func isBlock(mode fs.FileMode) bool {
	return mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0
}
