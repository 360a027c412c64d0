//go:build !linux

package nbdnl

import (
	"errors"
	"os"
)

func tryLock(*os.File) (bool, error) { return false, errors.ErrUnsupported }

func lockedByOther(*os.File) (bool, error) { return false, errors.ErrUnsupported }
