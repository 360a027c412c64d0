//go:build !linux

package blockdev

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"syscall"
)

func takeSocket(nc net.Conn) (*os.File, error) {
	return nil, errors.Join(nc.Close(), errors.ErrUnsupported)
}

func copySocket(syscall.Conn) (*os.File, error) { return nil, errors.ErrUnsupported }

func enlargeSendBuffer(*os.File, int, *slog.Logger) {}

func socketError(*os.File) error { return nil }

func resetSocket(*os.File) error { return nil }
