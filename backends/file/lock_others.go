//go:build !(linux || darwin || dragonfly || freebsd || netbsd || openbsd)

package file

import (
	"errors"
	"fmt"
)

// lock refuses: a writable image that is not locked is an accident to come.
func (f *File) lock(readOnly bool) error {
	return fmt.Errorf("file: %s: lock: %w", f.path, errors.ErrUnsupported)
}
