//go:build !linux

package kind

import (
	"errors"
	"os"
)

func keepFile(*os.File) ([]*os.File, error) { return nil, errors.ErrUnsupported }
