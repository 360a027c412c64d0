package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// maxSocketPath is the longest path that a Unix socket address holds, less the
// terminating NUL (sun_path, unix(7)).
const maxSocketPath = 107

// A Store is the directory under which every serving process has its own.
type Store struct{ dir string }

// OpenStore returns the store that the environment names: NBDCTL_STATE_DIR, or
// /run/nbdctl. Nothing is made until a device is served.
func OpenStore() (*Store, error) {
	dir := os.Getenv("NBDCTL_STATE_DIR")
	if dir == "" {
		dir = claim.Default
	}
	if !filepath.IsAbs(dir) {
		return nil, exit.Usagef("NBDCTL_STATE_DIR=%q: must be an absolute path", dir)
	}
	if n := len(filepath.Join(dir, uuidForLength, "ctl")); n > maxSocketPath {
		return nil, exit.Usagef("NBDCTL_STATE_DIR=%q: too long by %d bytes for the control socket's address",
			dir, n-maxSocketPath)
	}
	return &Store{dir: dir}, nil
}

// Dir returns the directory, which may not exist.
func (s *Store) Dir() string { return s.dir }

// System is the running machine, where programs meet in the directory.
func (s *Store) System() nbdnl.System { return nbdnl.System{StateDir: s.dir} }

const uuidForLength = "00000000-0000-0000-0000-000000000000"

// An Entry is what the store knows of one device.
type Entry struct {
	*Record
	// Alive tells whether the process that serves the device still runs.
	Alive bool
	// Keeper is the process that has another one serve the device when this one dies; nil: none
	// does.
	Keeper *Keeper

	dir string
}

// Entries lists what the store holds, in no order. What can't be read is left
// out: it is being made or removed at this moment, or damaged. A damaged record
// is reported in err beside the entries that could be read.
func (s *Store) Entries() ([]Entry, error) {
	names, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	var entries []Entry
	var damaged []error
	for _, n := range names {
		if !n.IsDir() || !isUUID(n.Name()) {
			continue
		}
		dir := filepath.Join(s.dir, n.Name())
		r, err := readRecord(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			damaged = append(damaged, err)
			continue
		}
		alive, err := lockHeld(filepath.Join(dir, "lock"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			damaged = append(damaged, err)
			continue
		}
		entries = append(entries, Entry{Record: r, Alive: alive, Keeper: readKeeper(dir), dir: dir})
	}
	return entries, errors.Join(damaged...)
}

// Wait returns when the process of e has ended and its directory is gone, or
// with ctx's error.
func (e *Entry) Wait(ctx context.Context) error {
	// Out of reach, it is the lock that tells.
	if process, err := e.living(); err == nil && process != nil {
		defer process.close()
		if err := process.wait(ctx); err != nil {
			return e.waiting(err)
		}
	}
	path := filepath.Join(e.dir, "lock")
	l, err := lockWait(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return e.waiting(err)
	}
	// The process has gone without removing its directory (it was killed):
	// what it left is ours to remove while we hold its lock.
	defer l.Close()
	return os.RemoveAll(e.dir)
}

// Ended tells whether the process of e has ended, or is about to: its
// directory goes with its device.
func (e *Entry) Ended() bool {
	held, err := lockHeld(filepath.Join(e.dir, "lock"))
	return errors.Is(err, fs.ErrNotExist) || err == nil && !held
}

func (e *Entry) waiting(err error) error {
	return fmt.Errorf("pid %d, which serves %s, has not ended: %w", e.PID, e.Spec.Backend(), err)
}

// Sweep removes the directories of processes that ended without doing it
// themselves, and whose device is not connected any more. What can't be read, or
// was never completed, belongs to no device.
func (s *Store) Sweep(ctx context.Context, connected func(Entry) bool) (err error) {
	// Not while somebody makes a directory, whose lock is not taken yet.
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	names, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	var errs []error
	for _, n := range names {
		uuid := strings.TrimPrefix(strings.TrimPrefix(n.Name(), newPrefix), gonePrefix)
		if n.IsDir() && isUUID(uuid) {
			errs = append(errs, s.sweep(filepath.Join(s.dir, n.Name()), connected))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) sweep(dir string, connected func(Entry) bool) error {
	r, err := readRecord(dir)
	if err == nil && connected(Entry{Record: r, dir: dir}) {
		return nil
	}
	// It does not wait: who holds the lock is alive. A directory without a lock
	// is half made or half removed. Who did that has ended, or would remove the
	// rest too.
	l, err := lockTry(filepath.Join(dir, "lock"))
	switch {
	case err == nil:
		defer l.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return os.RemoveAll(dir)
}

// Stale tells whether there is anything that Sweep might remove.
func (s *Store) Stale() bool {
	names, err := os.ReadDir(s.dir)
	if err != nil {
		return false
	}
	for _, n := range names {
		if strings.HasPrefix(n.Name(), newPrefix) || strings.HasPrefix(n.Name(), gonePrefix) {
			return true
		}
	}
	entries, err := s.Entries()
	return err != nil || slices.ContainsFunc(entries, func(e Entry) bool { return !e.Alive })
}

// isUUID tells the directories of devices from everything else in the store.
func isUUID(s string) bool {
	if len(s) != len(uuidForLength) {
		return false
	}
	for i, c := range []byte(s) {
		allowed := "0123456789abcdef"
		if uuidForLength[i] == '-' {
			allowed = "-"
		}
		if strings.IndexByte(allowed, c) < 0 {
			return false
		}
	}
	return true
}
