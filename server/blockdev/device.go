package blockdev

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A Device is a backend connected as /dev/nbdN and served by this process. It must be ended with
// Disconnect or Close. Its methods are safe for concurrent use.
type Device struct {
	machine    machine
	client     *nbdnl.Client
	ownsClient bool
	vacate     func() error    // gives the index back; called once
	tuned      bool            // the settings of the queue of the index were made before
	backend    backends.Device // guarded by changing, once the device is attached
	export     *server.Export
	options    Options
	flags      nbdnl.Flags
	log        *slog.Logger
	path       *atomic.Pointer[string] // for log; set by attach

	index       int               // set by attach
	incarnation nbdnl.Incarnation // of the kernel's device, to know it by; set by attach
	size        atomic.Int64      // that the kernel has, in bytes

	unsure bool // the kernel has not answered to a new size; guarded by changing
	// changing holds a value while Resize or Reconfigure is at work, commanding while the kernel
	// makes a change, which healing asks for too.
	changing, commanding chan struct{}
	changes              chan struct{} // holds a value when something has changed that nobody was told of

	attached chan struct{} // closed when the kernel has the device, and index is set
	done     chan struct{} // closed when every Transmit has returned
	err      error         // why they did; set before done is closed

	losses losses

	mu       sync.Mutex // guards all below but ending and ended
	slots    []*slot    // does not change after attach
	alive    int        // how many of the slots are
	keepers  int        // goroutines that serve a slot, or heal it
	goodbye  bool       // the kernel has announced the end
	leaving  bool       // by Kick, or all is cut
	lost     error      // what ended the connection that died first of those that are dead
	expiry   *expiry    // of the wait for a new connection, while all are dead
	kicked   bool       // by Kick
	written  bool       // all that was cached, by an orderly detach
	timeout  time.Duration
	deadTime time.Duration

	// mending ends when no connection is to be replaced any more.
	mending context.Context
	giveUp  context.CancelCauseFunc

	// ending holds a value while Disconnect or Close is at work: whoever comes second can give up
	// waiting.
	ending chan struct{}
	ended  bool // by one of them; guarded by ending
	// outcome is what there is to say of the end; guarded by ending.
	outcome outcome
}

// Index returns N of /dev/nbdN.
func (d *Device) Index() int { return d.index }

// Path returns the path of the device, such as "/dev/nbd0".
func (d *Device) Path() string { return nbdnl.Path(d.index) }

// Identifier returns the mark by which the kernel's device is known as this one.
func (d *Device) Identifier() string { return d.options.Identifier }

// Mode returns the interface by which the kernel was told. Of a device that was connected by ioctls
// no connection can be replaced.
func (d *Device) Mode() nbdnl.Mode { return d.client.Mode() }

// Size returns the size in bytes, as the kernel has it.
func (d *Device) Size() int64 { return d.size.Load() }

// BlockSize returns the logical block size in bytes.
func (d *Device) BlockSize() int { return d.export.BlockSize() }

// Connections returns the number of connections that the device was made with. Alive says how many
// of them serve.
func (d *Device) Connections() int { return len(d.slots) }

// Timeout returns how long the kernel waits for the answer to a request.
func (d *Device) Timeout() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.timeout
}

// DeadTimeout returns how long requests wait for a new connection when all are dead.
func (d *Device) DeadTimeout() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deadTime
}

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() bool { return d.export.Flags()&wire.FlagReadOnly != 0 }

// Export returns what serves the device's requests.
func (d *Device) Export() *server.Export { return d.export }

// Stats returns what each connection has served, those included whose place it has taken, in the
// order in which the kernel knows them.
func (d *Device) Stats() []server.Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	stats := make([]server.Stats, len(d.slots))
	for i, s := range d.slots {
		stats[i] = s.stats()
	}
	return stats
}

// Done returns a channel that is closed when no request is served any more and none will be: the
// device was disconnected, by whomever, or all its connections are dead and were not replaced. The
// backend may be closed from then on. Close is still due.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns nil until Done, and after the device was disconnected in order, else what ended the
// connection that died first. With all of them dead the kernel keeps the device, and fails all that
// is asked of it, until Close.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}
