//go:build !linux

package blockdev

import (
	"errors"
	"net"
	"os"
)

func sendFiles(*net.UnixConn, []*os.File) error { return errors.ErrUnsupported }

func receiveFiles(*net.UnixConn) ([]*os.File, error) { return nil, errors.ErrUnsupported }
