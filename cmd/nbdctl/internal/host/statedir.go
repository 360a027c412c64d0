package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// A directory has one of these before its name while it is being made or removed.
// No list shows it then.
const (
	newPrefix  = ".new-"
	gonePrefix = ".gone-"
)

// A stateDir is the directory of one serving process, and its claim to be alive.
type stateDir struct {
	path string
	lock *os.File
	left bool // another process has it
}

// newStateDir makes the directory for r, takes its lock and writes the record.
// The UUID, Identifier, PID and Spec of r are set. Nobody sees it half made.
func (s *Store) newStateDir(ctx context.Context, r *Record) (_ *stateDir, err error) {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := s.labelFree(r.Spec.Label); err != nil {
		return nil, err
	}

	made := filepath.Join(s.dir, newPrefix+r.UUID)
	if err := os.Mkdir(made, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	d := &stateDir{path: filepath.Join(s.dir, r.UUID)}
	r.Log = filepath.Join(d.path, "log")
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(made), closeFile(d.lock))
		}
	}()
	if d.lock, err = os.OpenFile(filepath.Join(made, "lock"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := lock(d.lock); err != nil {
		return nil, err
	}
	if err := r.write(made); err != nil {
		return nil, err
	}
	return d, os.Rename(made, d.path)
}

// leave has end leave the directory to the process that has another descriptor of its lock.
func (d *stateDir) leave() { d.left = true }

// end takes the directory away in one step. Only then does it let go of the
// lock, which says that the process is alive.
func (d *stateDir) end() error {
	if d.left {
		return d.lock.Close()
	}
	gone := filepath.Join(filepath.Dir(d.path), gonePrefix+filepath.Base(d.path))
	if err := os.Rename(d.path, gone); err != nil {
		gone = d.path
	}
	return errors.Join(os.RemoveAll(gone), d.lock.Close())
}

// labelFree refuses a label that a living process has.
func (s *Store) labelFree(label string) error {
	if label == "" {
		return nil
	}
	// What can't be read can't be compared, and is no reason to refuse.
	entries, _ := s.Entries()
	for _, e := range entries {
		if e.Alive && e.Spec.Label == label {
			return exit.With(exit.Busy, "--name %s: the name of %s already, served by pid %d; choose another",
				label, e.Device(), e.PID)
		}
	}
	return nil
}

// lock serialises those who make directories in the store, so that of two
// that want one label only one gets it.
func (s *Store) lock(ctx context.Context) (unlock func() error, err error) {
	unlock, err = LockPath(ctx, filepath.Join(s.dir, ".lock"))
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", s.dir, err)
	}
	return unlock, nil
}

// LockPath waits for the lock of a file that it makes at path. The file goes with the
// last user.
func LockPath(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := retry(ctx, func() (*os.File, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lock(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		// The holder before us removes the file before it lets go. A lock on a file
		// that is no longer at its path keeps nobody out.
		mine, err1 := f.Stat()
		theirs, err2 := os.Stat(path)
		if err1 != nil || err2 != nil || !os.SameFile(mine, theirs) {
			return nil, errors.Join(errLocked, f.Close())
		}
		return f, nil
	})
	if err != nil {
		return nil, err
	}
	return func() error { return errors.Join(os.Remove(path), f.Close()) }, nil
}

// closeFile closes f, which may be nil.
func closeFile(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}
