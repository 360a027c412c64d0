//go:build !linux

package nbdnl

import (
	"errors"
	"io"
)

func openUevents() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }
