package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
)

// stateDirEnv names the directory of state that programs share, instead of /run/nbdctl.
const stateDirEnv = "NBDCTL_STATE_DIR"

// A Claimed is the sole right to connect and disconnect the device of one index, among all processes
// that ask for it with Claim. The kernel knows nothing of it.
type Claimed struct {
	file *os.File // flocked; the lock goes with the process, however it ends
}

// Claim waits until no other process, and nobody else in this one, claims the index, or until ctx ends.
// It takes for granted neither that the device exists nor that it is free.
//
// Claims are locks on files below /run/nbdctl/claims, or claims in the directory that the environment
// variable NBDCTL_STATE_DIR names; a file is removed when its claim is released.
func Claim(ctx context.Context, index int) (*Claimed, error) { return System{}.Claim(ctx, index) }

// Claim is the function Claim for the system. The claims of a system with a Root of its own are below
// that root.
func (s System) Claim(ctx context.Context, index int) (*Claimed, error) {
	c, err := s.claim(ctx, index)
	return c, newError("claim", index, err)
}

// Release gives the claim up.
func (c *Claimed) Release() error {
	// Removed while locked: whoever opened the file before finds, once it has the lock, that the path
	// leads elsewhere, and tries again.
	return errors.Join(os.Remove(c.file.Name()), c.file.Close())
}

func (s *System) claim(ctx context.Context, index int) (*Claimed, error) {
	if index < 0 || index > maxIndex {
		return nil, fmt.Errorf("index is not within 0 and %d: %w", maxIndex, os.ErrInvalid)
	}
	pause := backoff.New()
	defer pause.Stop()
	for {
		c, err := s.tryClaim(index)
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
func (s *System) tryClaim(index int) (*Claimed, error) {
	path := filepath.Join(s.stateDir(), "claims", name(index))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return tryClaim(path)
}

func (s *System) stateDir() string {
	if dir := os.Getenv(stateDirEnv); dir != "" {
		return dir
	}
	return s.path("run/nbdctl")
}

// tryClaim returns nil when the file is locked by another, or was removed while it was being locked.
func tryClaim(path string) (*Claimed, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	locked, err := tryLock(f)
	if err == nil && locked && isAt(f, path) {
		return &Claimed{file: f}, nil
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
