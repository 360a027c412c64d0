//go:build !linux

package nbdnl

import "errors"

func ioctl(int, uintptr, uintptr) error { return errors.ErrUnsupported }

func maskSignals() error { return errors.ErrUnsupported }

func threadID() int { return 0 }
