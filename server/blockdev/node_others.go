//go:build !linux

package blockdev

import (
	"context"
	"errors"

	"github.com/nbdctl/nbdctl/nbdnl"
)

func readFirst(ctx context.Context, path, number string, n int) error {
	return errors.ErrUnsupported
}

func syncFileSystem(dev nbdnl.Device) error { return errors.ErrUnsupported }

func syncMount(string, uint64) (bool, error) { return false, errors.ErrUnsupported }

func awaitNode(ctx context.Context, try func() error) error { return errors.ErrUnsupported }
