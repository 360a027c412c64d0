package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Changes returns a channel that has a value whenever a record has appeared,
// changed or gone since the last was taken. It ends with ctx.
func (s *Store) Changes(ctx context.Context) (<-chan struct{}, error) {
	w, err := newWatcher()
	if err != nil {
		return nil, fmt.Errorf("watching the state directory: %w", err)
	}
	c := &changes{store: s, watcher: w, changed: make(chan struct{}, 1)}
	if err := c.follow(); err != nil {
		return nil, errors.Join(err, w.close())
	}
	context.AfterFunc(ctx, func() { _ = w.close() })
	go c.run()
	return c.changed, nil
}

// changes follows what happens below a store's directory.
type changes struct {
	store   *Store
	watcher *watcher
	changed chan struct{}
}

// run passes on what the watcher tells, until that is closed.
func (c *changes) run() {
	for {
		appeared, err := c.watcher.next()
		if err != nil {
			return
		}
		if appeared {
			// Something may have appeared in a new directory before it was
			// watched. Whoever takes the value looks at that too.
			_ = c.follow()
		}
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
}

// follow watches the store's directory, those in it, and the one in which it is
// or will be, for a store that was removed may come back. To watch a directory
// twice is to watch it once.
func (c *changes) follow() error {
	above := filepath.Dir(c.store.dir)
	for _, err := os.Stat(above); errors.Is(err, fs.ErrNotExist); _, err = os.Stat(above) {
		above = filepath.Dir(above)
	}
	if err := c.add(above); err != nil {
		return err
	}
	names, err := os.ReadDir(c.store.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := c.add(c.store.dir); err != nil {
		return err
	}
	for _, n := range names {
		if n.IsDir() && isUUID(n.Name()) {
			if err := c.add(filepath.Join(c.store.dir, n.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *changes) add(dir string) error {
	// It may have gone, and something else be there.
	if err := c.watcher.add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	return nil
}
