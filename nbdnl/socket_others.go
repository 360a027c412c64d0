//go:build !linux

package nbdnl

import (
	"errors"
	"syscall"
)

func dupSockets([]syscall.Conn) ([]int, error) { return nil, errors.ErrUnsupported }

func closeAll([]int) {}
