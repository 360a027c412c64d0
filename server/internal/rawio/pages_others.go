//go:build !linux || !(amd64 || arm64) || race || nbd_portable

package rawio

import (
	"errors"
	"os"
)

// Pages are none here.
type Pages struct{}

// Take fails.
func (p *Pages) Take(f *os.File, off int64, n int) error { return errors.ErrUnsupported }

// Len returns 0.
func (p *Pages) Len() int { return 0 }

// Drop does nothing.
func (p *Pages) Drop() {}
