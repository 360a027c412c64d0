//go:build !linux

package rawio

import "errors"

// Reset is not to be had.
func Reset(fd int) error { return errors.ErrUnsupported }
