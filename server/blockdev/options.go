package blockdev

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// minBlockSize is the sector of the block layer.
	minBlockSize = 512
	// defaultTimeout is what disks have.
	defaultTimeout = 30 * time.Second
	// defaultConnections is what one user can make use of: the kernel picks the connection by the
	// processor that submits.
	defaultConnections = 1
	// maxConnections is more than any use of a device has been seen to gain from.
	maxConnections = 256
)

// Options say how a backend becomes a device. The zero value is ready to use.
type Options struct {
	// Client controls the kernel; it must stay open for as long as the device lives. nil: the
	// device opens one for itself.
	Client *nbdnl.Client
	// BlockSize is the device's logical block size in bytes: a power of two from 512 to the
	// kernel's limit, usually the page size. The size of the backend must be a multiple of it. 0:
	// what the backend needs, at least 512. At 4096 the partitions of images that were made for
	// disks with sectors of 512 bytes are not found.
	BlockSize int
	// Connections is the number of connections to the kernel, at most 256. More than processors are
	// of no use. 0: 1.
	Connections int
	// Timeout is how long the kernel waits for the answer to a request before it takes the
	// connection for dead, and sends the request again over another. Whole seconds. It must be
	// above what the backend may take. 0: 30 s.
	Timeout time.Duration
	// DeadTimeout is how long requests wait for a new connection when all are dead, before they
	// fail. The device makes that connection itself, at once. A request that is sent again and
	// again fails at the latest 10 s after both timeouts. Whole seconds. 0: requests fail at once
	// when all connections are dead.
	DeadTimeout time.Duration
	// Recoverable has the device keep account, in memory that outlives the process, of which
	// connections stand still, so that Recover can go on with those at once after a crash. Another
	// process has to keep descriptors of it for that (Device.Keep). It takes one descriptor and a
	// page of memory, and means nothing for a device by ioctls or of ConnectRemote.
	Recoverable bool
	// ReadOnly makes a read-only device of a backend that could be written.
	ReadOnly bool
	// Unopened leaves the first open to others. Connect returns as soon as the kernel has connected
	// the device, which is usable then; but that the backend can be read has not been tried, and
	// the partitions are scanned, and their nodes made, in the first open.
	Unopened bool
	// Identifier marks the device as the caller's, in /sys/block/nbdN/backend. Nobody else may use
	// it. Empty: the name of the program, and a UUID.
	Identifier string
	// MaxInFlight bounds the requests that one connection executes at once. 0: 128, which is all
	// that the kernel ever sends.
	MaxInFlight int
	// Logger takes failed requests, connections that were lost and replaced, and settings that
	// could not be made. Each record has the device ("/dev/nbd3") and its identifier. nil: none.
	Logger *slog.Logger
}

// complete fills in the defaults of a device whose requests are of so many bytes at least.
func (o Options) complete(minimum int) Options {
	if o.BlockSize == 0 {
		o.BlockSize = max(minBlockSize, minimum)
	}
	if o.Connections == 0 {
		o.Connections = defaultConnections
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Identifier == "" {
		o.Identifier = nbdnl.NewIdentifier(filepath.Base(os.Args[0]))
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// check says what is impossible of completed options.
func (o Options) check() error {
	switch {
	case o.Connections < 0 || o.Connections > maxConnections:
		return fmt.Errorf("blockdev: %d connections are not within 1 and %d", o.Connections, maxConnections)
	case o.BlockSize < minBlockSize:
		return fmt.Errorf("blockdev: block size %d: a block device has at least %d bytes",
			o.BlockSize, minBlockSize)
	}
	return nil
}

// export checks the backend against completed options, and offers it.
func (o Options) export(b backends.Backend, log *slog.Logger) (*server.Export, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	e, err := server.NewExport(b, server.Options{
		ReadOnly: o.ReadOnly, BlockSize: o.BlockSize, MaxInFlight: o.MaxInFlight, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	if e.Size() == 0 {
		return nil, errors.New("blockdev: the backend has size 0: there is no such block device")
	}
	return e, nil
}

// kernelFlags returns what the kernel is told of an export of dev.
//
// Zeroes that the server would have to write are left to the kernel: it writes them in requests of
// ordinary length, while one WRITE_ZEROES may cover 4 GiB and has the time of a single request.
func kernelFlags(e *server.Export, dev backends.Device) nbdnl.Flags {
	f := nbdnl.Flags(e.Flags() &^ (wire.FlagSendCache | wire.FlagSendFastZero)) // It sends neither.
	if dev.Zeroer == nil {
		f &^= nbdnl.FlagSendWriteZeroes
	}
	return f
}
