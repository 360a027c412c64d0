package blockdev

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/server"
)

// A Device is a backend connected as /dev/nbdN and served by this process, or an export of another
// server to which the kernel is connected, watched over by this process. It must be ended with
// Disconnect or Close. Its methods are safe for concurrent use.
type Device struct {
	machine    machine
	client     *nbdnl.Client
	ownsClient bool
	giveBack   func() error // gives the index back; called once
	lease      *claim.Lease // of the index; nil: it is not leased
	ledger     *ledger      // nil: there is none
	tuned      bool         // the settings of the queue of the index were made before
	source     source
	backend    backends.Device // guarded by changing, once the device is attached
	export     *server.Export  // nil: the kernel speaks with a server elsewhere
	blockSize  int             // in bytes
	readOnly   bool
	options    Options
	flags      nbdnl.Flags
	log        *slog.Logger
	path       *atomic.Pointer[string] // for log; set by attach

	index       int               // set by attach
	incarnation nbdnl.Incarnation // of the kernel's device, to know it by; set by attach
	size        atomic.Int64      // that the kernel has, in bytes

	unsure bool // the kernel has not answered to a new size; guarded by changing
	// changing holds a value while Resize or Reconfigure is at work, commanding while the kernel
	// makes a change, which a reconnection asks for too.
	changing, commanding chan struct{}
	changes              chan struct{} // holds a value when something has changed that nobody was told of

	conns     *connections
	unseen    *unseen // connections of it; nil: there are none
	losses    losses
	recovered recovery // by Recover

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
func (d *Device) BlockSize() int { return d.blockSize }

// Connections returns the number of connections that the device was made with. Alive says how many
// of them serve.
func (d *Device) Connections() int { return len(d.conns.all) }

// Timeout returns how long the kernel waits for the answer to a request.
func (d *Device) Timeout() time.Duration {
	timeout, _ := d.conns.timeouts()
	return timeout
}

// DeadTimeout returns how long requests wait for a new connection when all are dead.
func (d *Device) DeadTimeout() time.Duration {
	_, deadTimeout := d.conns.timeouts()
	return deadTimeout
}

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() bool { return d.readOnly }

// Export returns what serves the device's requests; nil of a device of ConnectRemote.
func (d *Device) Export() *server.Export { return d.export }

// Stats returns what each connection has served, those included whose place it has taken, in the
// order in which the kernel knows them. It is nothing of a device of ConnectRemote, of which the
// kernel counts (/sys/block/nbdN/stat).
func (d *Device) Stats() []server.Stats { return d.conns.stats() }

// Alive returns how many of the device's connections are served. One whose loop is in a call of a
// backend that takes writes without blocking (backends.WriterAtFrom) counts until that returns.
func (d *Device) Alive() int { return d.conns.count() }

// State returns what the device is doing: StateLive; StateDegraded while some of its connections
// are dead; StateWaiting while all are, and requests wait for a new one; StateDisconnecting when
// its end has begun; after Done, StateIdle if it was disconnected in order or handed over, else
// StateOrphaned, as is a device all of whose connections are dead for good.
func (d *Device) State() nbdnl.State { return d.conns.state() }

// Changes returns a channel from which something can be received after State, Alive, Size, Timeout
// or DeadTimeout have changed, or something was lost while all that had been was acknowledged, once
// for all changes since. It is for one receiver, and is never closed.
func (d *Device) Changes() <-chan struct{} { return d.changes }

// changed tells of a change.
func (d *Device) changed() {
	select {
	case d.changes <- struct{}{}:
	default:
	}
}

// Done returns a channel that is closed when no request is served any more and none will be: the
// device was disconnected, by whomever, or all its connections are dead and were not replaced. The
// backend may be closed from then on. Close is still due.
func (d *Device) Done() <-chan struct{} { return d.conns.done }

// Err returns nil until Done, and after the device was disconnected in order; ErrHandedOver after
// another process has it; else what ended the connection that died first. With all of them dead the
// kernel keeps the device, and fails all that is asked of it, until Close.
func (d *Device) Err() error {
	select {
	case <-d.conns.done:
		return d.conns.err
	default:
		return nil
	}
}

// overdue is by how much a request may exceed the timeouts before the server answers it itself.
// With what the kernel adds, that is 10 seconds at most.
const overdue = 7 * time.Second

// bePatient tells the server for how long the kernel is, if it is this one.
func (d *Device) bePatient() {
	if d.export == nil {
		return
	}
	timeout, deadTimeout := d.conns.timeouts()
	d.export.SetPatience(server.Patience{Resend: timeout, Total: timeout + deadTimeout + overdue})
}
