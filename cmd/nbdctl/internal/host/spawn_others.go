//go:build !linux

package host

import (
	"context"
	"errors"
	"net"
	"os"
)

// Spawned is for Linux: elsewhere there is no NBD driver to serve.
type Spawned struct{ Record *Record }

// Accept is for Linux.
func (*Spawned) Accept() error { return errors.ErrUnsupported }

// Reject is for Linux.
func (*Spawned) Reject() error { return errors.ErrUnsupported }

// Spawn is for Linux.
func Spawn(context.Context, Spec, int) (*Spawned, []string, error) {
	return nil, nil, errors.ErrUnsupported
}

// RunSpawned is for Linux.
func RunSpawned(
	context.Context, *Store, func(context.Context, Spec) (*Backing, error),
	func(context.Context, Spec, Inheritance) (*Backing, error),
) error {
	return errors.ErrUnsupported
}

// Upgrade is for Linux.
func (*Entry) Upgrade(context.Context) (*Record, []string, error) {
	return nil, nil, errors.ErrUnsupported
}

// Attach is for Linux.
func (*Entry) Attach(context.Context, Spec, int) (*Record, []string, error) {
	return nil, nil, errors.ErrUnsupported
}

func startKeeper() (*net.UnixConn, error) { return nil, errors.ErrUnsupported }

func unixConn(*os.File) (*net.UnixConn, error) { return nil, errors.ErrUnsupported }

func redirectStderr(*os.File) error { return errors.ErrUnsupported }

func hungUp(net.Conn) bool { return false }

// Cut is for Linux.
func (*Entry) Cut() error { return errors.ErrUnsupported }

// Kill is for Linux.
func (*Entry) Kill(context.Context) error { return errors.ErrUnsupported }

// Signals is for Linux.
func Signals() (<-chan os.Signal, func()) { return nil, func() {} }

// Inherited is for Linux.
func Inherited(int) bool { return true }

func pending(<-chan os.Signal) []os.Signal { return nil }

// Privately is for Linux.
func Privately(f func()) { f() }

// Publish is for Linux.
func Publish() {}

// A process can be watched on Linux.
type process struct{}

func watchProcess(int) (*process, error)    { return nil, errors.ErrUnsupported }
func (*process) wait(context.Context) error { return errors.ErrUnsupported }
func (*process) close()                     {}

func ignoreStops() {}
