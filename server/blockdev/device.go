package blockdev

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// A Device is a backend connected as /dev/nbdN and served by this process. It must be ended with Disconnect or Close. Its methods
// are safe for concurrent use.
type Device struct {
	machine    machine
	client     *nbdnl.Client
	ownsClient bool
	export     *server.Export
	options    Options
	flags      nbdnl.Flags
	maxRequest int // of the backend, in bytes; 0: no opinion
	log        *slog.Logger

	index int         // set by attach
	birth os.FileInfo // of the kernel's device, to know it by where there are no identifiers; set by ready
	conns []*server.Conn

	done chan struct{} // closed when every Transmit has returned
	err  error         // why they did; set before done is closed

	// ending holds a value while Disconnect or Close is at work: whoever comes second can give up waiting.
	ending chan struct{}
	ended  bool // by one of them; guarded by ending
}

// Index returns N of /dev/nbdN.
func (d *Device) Index() int { return d.index }

// Path returns the path of the device, such as "/dev/nbd0".
func (d *Device) Path() string { return nbdnl.Path(d.index) }

// Identifier returns the mark by which the kernel's device is known as this one.
func (d *Device) Identifier() string { return d.options.Identifier }

// Size returns the size in bytes.
func (d *Device) Size() int64 { return d.export.Size() }

// BlockSize returns the logical block size in bytes.
func (d *Device) BlockSize() int { return d.export.BlockSize() }

// Connections returns the number of connections that the device was made with.
func (d *Device) Connections() int { return len(d.conns) }

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() bool { return d.export.Flags()&server.FlagReadOnly != 0 }

// Export returns what serves the device's requests.
func (d *Device) Export() *server.Export { return d.export }

// Stats returns what each connection has served, in the order in which the kernel knows them.
func (d *Device) Stats() []server.Stats {
	stats := make([]server.Stats, len(d.conns))
	for i, c := range d.conns {
		stats[i] = c.Stats()
	}
	return stats
}

// Done returns a channel that is closed when no request is served any more: the device was disconnected, by whomever, or all its
// connections are dead. The backend may be closed from then on. Close is still due.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns nil while the device lives and after it was disconnected in order, else what ended the connection that died first.
// With all of them dead the kernel keeps the device, and fails all that is asked of it, until Close.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// serve starts to serve the connections. They end by themselves, by cut, or by the kernel.
func (d *Device) serve(ends []*net.UnixConn) {
	lost := make(chan error, len(ends))
	for i, end := range ends {
		c := d.export.NewConn(end, nil)
		d.conns = append(d.conns, c)
		go func() { lost <- transmit(i, c) }()
	}
	go d.reap(lost)
}

// transmit serves one connection to its end. The error is nil if the kernel has announced that end.
func transmit(i int, c *server.Conn) error {
	err := c.Transmit()
	c.Close() // The kernel must see that nobody is there, whatever the reason.
	switch {
	case c.Disconnected():
		return nil
	case err == nil:
		err = io.ErrUnexpectedEOF // The kernel takes the server for dead, as after a timeout.
	}
	return fmt.Errorf("blockdev: connection %d ended without a disconnect: %w", i, err)
}

// reap waits until all connections have ended, and closes done.
func (d *Device) reap(lost <-chan error) {
	var first error
	orderly := false
	for range d.conns {
		err := <-lost
		if err == nil {
			orderly = true
			continue
		}
		d.log.Warn("connection lost", "device", d.Identifier(), "err", err)
		if first == nil {
			first = err
		}
	}
	if !orderly {
		d.err = first
	}
	close(d.done)
}

// cut ends all connections at once. Their goroutines end when the backend calls in flight have.
func (d *Device) cut() {
	for _, c := range d.conns {
		c.Close()
	}
}
