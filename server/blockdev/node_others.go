//go:build !linux

package blockdev

import (
	"context"
	"errors"
)

func readFirst(ctx context.Context, path, number string, n int) error {
	return errors.ErrUnsupported
}
