//go:build !unix || aix

package nbd

import (
	"errors"
	"net"
	"os"
)

// duplicate has no counterpart on this system.
func duplicate(net.Conn) (*os.File, error) { return nil, errors.ErrUnsupported }
