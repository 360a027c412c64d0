//go:build !linux

package blockdev

import (
	"errors"
	"os"
	"syscall"
)

func makeSlots(int) (*os.File, []slot, func() error, error) {
	return nil, nil, nil, errors.ErrUnsupported
}

func copyFile(syscall.Conn) (*os.File, error) { return nil, errors.ErrUnsupported }

func hungUp(syscall.Conn) (bool, error) { return false, errors.ErrUnsupported }
