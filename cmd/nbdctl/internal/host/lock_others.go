//go:build !linux

package host

import (
	"context"
	"errors"
	"os"
)

func lockTry(string) (*os.File, error)                   { return nil, errors.ErrUnsupported }
func lockWait(context.Context, string) (*os.File, error) { return nil, errors.ErrUnsupported }
func lock(*os.File) error                                { return errors.ErrUnsupported }
func lockHeld(string) (bool, error)                      { return false, errors.ErrUnsupported }
