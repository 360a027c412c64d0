//go:build !linux

package blockdev

import (
	"errors"
	"log/slog"
)

func openLinks(n, sendBuffer int, log *slog.Logger) (*links, error) {
	return nil, errors.ErrUnsupported
}
