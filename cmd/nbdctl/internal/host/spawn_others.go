//go:build !linux

package host

import (
	"context"
	"errors"
	"os"
)

// Spawn is for Linux: elsewhere there is no NBD driver to serve.
func Spawn(context.Context, Spec) (*Record, []string, error) {
	return nil, nil, errors.ErrUnsupported
}

// RunSpawned is for Linux.
func RunSpawned(context.Context, *Store, func(Spec) (*Backing, error)) error {
	return errors.ErrUnsupported
}

func redirectStderr(*os.File) error { return errors.ErrUnsupported }
