//go:build !linux

package host

import (
	"errors"
	"log/slog"
	"net"
	"os"
)

// A Successor is for Linux.
type Successor struct{ Conn *net.UnixConn }

// A Succession is for Linux.
type Succession struct{ Conn *net.UnixConn }

// Succeeding is for Linux.
func Succeeding() (*Succession, error) { return nil, nil }

// Served is for Linux.
func (*Succession) Served() error { return errors.ErrUnsupported }

// Succeed is for Linux.
func Succeed(*os.File, *Succession) (*Successor, error) { return nil, errors.ErrUnsupported }

// PID is for Linux.
func (*Successor) PID() int { return 0 }

// Signal is for Linux.
func (*Successor) Signal(os.Signal, *slog.Logger) {}

// End is for Linux.
func (*Successor) End() {}

// Wait is for Linux.
func (*Successor) Wait(<-chan os.Signal, <-chan struct{}, *slog.Logger) int { return 0 }
