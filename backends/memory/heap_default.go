//go:build !linux || 386 || arm || mips || mipsle

package memory

import (
	"errors"
	"os"
)

func newStore(size int64, l *limit) (store, error) { return newHeapStore(size, l) }

func inheritStore(int64, *limit, []*os.File) (store, error) { return nil, errors.ErrUnsupported }
