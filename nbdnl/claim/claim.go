package claim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// A Claim is the sole right to connect and disconnect the device of one index, among all processes
// that ask for it.
type Claim struct {
	file *os.File // flocked; the lock goes with the process, however it ends
}

// Claim waits until no other process, and nobody else in this one, claims the index, or until ctx
// ends. It takes for granted neither that the device exists nor that it is free.
//
// A claim is a lock on a file below claims, which is removed when the claim is released.
func (d Dir) Claim(ctx context.Context, index int) (*Claim, error) {
	c, err := d.claim(ctx, index)
	return c, wrap("claim", index, err)
}

// TryClaim is Claim, but does not wait: the error matches ErrBusy when somebody else claims the
// index at this moment.
func (d Dir) TryClaim(index int) (*Claim, error) {
	if err := names.Check(index); err != nil {
		return nil, wrap("claim", index, err)
	}
	c, err := d.tryClaim(index)
	if c == nil && err == nil {
		err = fmt.Errorf("%w: another process is at work on it", ErrBusy)
	}
	return c, wrap("claim", index, err)
}

// Release gives the claim up.
func (c *Claim) Release() error {
	// Removed while locked: whoever opened the file before finds, once it has the lock, that the
	// path leads elsewhere, and tries again.
	var err error
	if isAt(c.file, c.file.Name()) { // Who has inherited a lease may have removed it before.
		err = os.Remove(c.file.Name())
	}
	return errors.Join(err, c.file.Close())
}

func (d Dir) claim(ctx context.Context, index int) (*Claim, error) {
	if err := names.Check(index); err != nil {
		return nil, err
	}
	pause := backoff.New()
	defer pause.Stop()
	for {
		c, err := d.tryClaim(index)
		if err != nil {
			return nil, err
		}
		if c != nil {
			return c, nil
		}
		// flock(2) itself can't be waited for together with a context.
		if err := pause.Wait(ctx, nil); err != nil {
			return nil, fmt.Errorf("another process is at work on it: %w", err)
		}
	}
}

// tryClaim returns nil when somebody else has the claim at this moment.
func (d Dir) tryClaim(index int) (*Claim, error) {
	path := d.file("claims", index)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return try(path)
}

// try returns nil when the file is locked by another, or was removed while it was being locked.
func try(path string) (*Claim, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	locked, err := tryLock(f)
	if err == nil && locked && isAt(f, path) {
		return &Claim{file: f}, nil
	}
	return nil, errors.Join(err, f.Close())
}

// isAt reports whether the path leads to this very file.
func isAt(f *os.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(mine, there)
}
