//go:build !linux

package claim

import (
	"errors"
	"os"
)

func tryLock(*os.File) (bool, error) { return false, errors.ErrUnsupported }

func lockedByOther(*os.File) (bool, error) { return false, errors.ErrUnsupported }

func duplicate(*os.File, string) (*os.File, error) { return nil, errors.ErrUnsupported }
