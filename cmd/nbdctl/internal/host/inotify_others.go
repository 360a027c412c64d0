//go:build !linux

package host

import "errors"

type watcher struct{}

func newWatcher() (*watcher, error) { return nil, errors.ErrUnsupported }

func (*watcher) add(string) error { return errors.ErrUnsupported }

func (*watcher) next() (bool, error) { return false, errors.ErrUnsupported }

func (*watcher) close() error { return nil }
