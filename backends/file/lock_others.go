//go:build !(linux || darwin || dragonfly || freebsd || netbsd || openbsd)

package file

import "errors"

// lock refuses: a writable image that is not locked is an accident to come.
func (f *File) lock(readOnly bool) error {
	return &NoLocksError{Path: f.path, Err: errors.ErrUnsupported}
}
