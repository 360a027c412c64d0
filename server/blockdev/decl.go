package blockdev

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// Options say how a backend becomes a device. The zero value is ready to use.
type Options struct {
	Client      *nbdnl.Client
	BlockSize   int
	Connections int
	Timeout     time.Duration
	DeadTimeout time.Duration
	ReadOnly    bool
	Identifier  string
	MaxInFlight int
	Logger      *slog.Logger
}

// A Device is a backend connected as /dev/nbdN.
type Device struct{ export *server.Export }

// Connect makes b a device whose index the kernel chooses.
func Connect(ctx context.Context, b backends.Backend, o Options) (*Device, error) {
	return nil, errors.ErrUnsupported
}

// ConnectIndex makes b the device /dev/nbd<index>.
func ConnectIndex(ctx context.Context, index int, b backends.Backend, o Options) (*Device, error) {
	return nil, errors.ErrUnsupported
}

func (d *Device) Index() int                           { return -1 }
func (d *Device) Path() string                         { return "" }
func (d *Device) Identifier() string                   { return "" }
func (d *Device) Size() int64                          { return 0 }
func (d *Device) BlockSize() int                       { return 0 }
func (d *Device) Connections() int                     { return 0 }
func (d *Device) ReadOnly() bool                       { return false }
func (d *Device) Export() *server.Export               { return d.export }
func (d *Device) Stats() []server.Stats                { return nil }
func (d *Device) Done() <-chan struct{}                { return nil }
func (d *Device) Err() error                           { return nil }
func (d *Device) Disconnect(ctx context.Context) error { return errors.ErrUnsupported }
func (d *Device) Close() error                         { return errors.ErrUnsupported }
