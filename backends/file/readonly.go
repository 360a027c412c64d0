package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// A ReadOnlyError says that a file can be read but not written, or not up to its end. It
// matches syscall.EROFS, and what the kernel has said. Nothing has been done to the file;
// with Options.ReadOnly it is a device that is read-only.
type ReadOnlyError struct {
	Path   string
	Reason string
	Err    error // of the kernel; nil if it was not for the kernel to say
}

func (e *ReadOnlyError) Error() string {
	return fmt.Sprintf("file: %s: it can't be written: %s", e.Path, e.Reason)
}

// Is reports whether target is syscall.EROFS.
func (e *ReadOnlyError) Is(target error) bool { return target == syscall.EROFS }

// Unwrap returns what the kernel has said.
func (e *ReadOnlyError) Unwrap() error { return e.Err }

// writeProtected reports whether an error of opening or writing a file says that it can't
// be written, whatever is written and whenever.
func writeProtected(err error) bool {
	return errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission)
}

// refused returns what a refusal to open an existing file for writing means: a
// *ReadOnlyError if it can be opened for reading.
func refused(path string, block bool, err error) error {
	if writeProtected(err) {
		if f, readErr := os.Open(path); readErr == nil {
			cause := errors.Unwrap(err) // of a *fs.PathError
			reason := whyProtected(f, block, cause)
			_ = f.Close() // Nothing was done with it.
			return &ReadOnlyError{Path: path, Reason: reason, Err: cause}
		}
	}
	return fmt.Errorf("file: %w", err)
}

// tooLong returns what EFBIG for a file of that size means, other errors as they are.
func tooLong(err error, size int64) error {
	if !errors.Is(err, syscall.EFBIG) {
		return err
	}
	if limit, ok := sizeLimit(); ok && size > limit {
		return fmt.Errorf(
			"a size of %d bytes: this process may write the first %d bytes of a file only (ulimit -f): %w",
			size, limit, syscall.EFBIG,
		)
	}
	return fmt.Errorf("a size of %d bytes: its file system has no files that long: %w", size, syscall.EFBIG)
}
