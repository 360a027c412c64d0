package blockdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/internal/rawio"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A Remote is an export of an NBD server with which the kernel can speak by itself: over TCP or a
// Unix socket, without TLS, with simple replies, and in blocks that it knows. Package backends/nbd
// has one.
type Remote interface {
	// Size returns the size in bytes, in whole blocks. It must not change.
	Size() int64
	// Flags returns what the server has said of the export.
	Flags() wire.Flags
	// BlockSizes returns what the server demands of requests; zero fields are no demand.
	BlockSizes() backends.BlockSizes
	// Dial makes a connection on which the negotiation has ended with this export, by simple
	// replies. It must be a *net.TCPConn or a *net.UnixConn, and have what is to notice a peer that
	// is silent (keepalive and TCP_USER_TIMEOUT); it belongs to the Device from then on. An export
	// that is not the same as before must be an error. It is called again for each connection that
	// is to be replaced, by several goroutines.
	Dial(ctx context.Context) (net.Conn, error)
}

// ConnectRemote is Connect for an export of another server, to which the kernel has the
// connections: no request passes through this process, which watches over them, and replaces those
// that are lost (package documentation, "Exports of other servers"). Options.Unopened,
// Options.MaxInFlight and what follows from a backend's abilities do not apply. A server that does
// not promise that its connections agree (NBD_FLAG_CAN_MULTI_CONN) gets one.
//
// The error matches errors.ErrUnsupported if the kernel cannot speak with the export: then
// backends/nbd can, and Connect makes a device of that.
func ConnectRemote(ctx context.Context, r Remote, o Options) (*Device, error) {
	return machine{}.connectRemote(ctx, anyIndex, r, o)
}

// ConnectRemoteIndex is to ConnectRemote what ConnectIndex is to Connect.
func ConnectRemoteIndex(ctx context.Context, index int, r Remote, o Options) (*Device, error) {
	if index < 0 {
		return nil, fmt.Errorf("blockdev: there is no device with index %d", index)
	}
	return machine{}.connectRemote(ctx, index, r, o)
}

func (m machine) connectRemote(ctx context.Context, index int, r Remote, o Options) (*Device, error) {
	device := func() (*Device, error) { return m.newRemoteDevice(r, o) }
	return m.establish(ctx, device, placeAt(index), func() error { return nil })
}

// understood are the flags that mean something to the kernel.
const understood = wire.FlagHasFlags | wire.FlagReadOnly | wire.FlagSendFlush | wire.FlagSendFUA |
	wire.FlagRotational | wire.FlagSendTrim | wire.FlagSendWriteZeroes | wire.FlagCanMultiConn

// newRemoteDevice checks what can be checked before anything is touched.
func (m machine) newRemoteDevice(r Remote, o Options) (*Device, error) {
	if r == nil {
		return nil, errors.New("blockdev: no export")
	}
	sizes, flags := r.BlockSizes(), r.Flags()&understood
	o = o.complete(sizes.Minimum)
	if err := o.check(); err != nil {
		return nil, err
	}
	switch size := r.Size(); {
	case size <= 0:
		return nil, fmt.Errorf("blockdev: the export has size %d: there is no such block device", size)
	case o.BlockSize < sizes.Minimum:
		return nil, fmt.Errorf("blockdev: block size %d: the server takes no less than %d: %w",
			o.BlockSize, sizes.Minimum, errors.ErrUnsupported)
	case sizes.Maximum > 0 && sizes.Maximum < max(o.BlockSize, smallestLimit):
		return nil, fmt.Errorf("blockdev: the server takes no more than %d bytes at once: %w",
			sizes.Maximum, errors.ErrUnsupported)
	}
	if o.ReadOnly {
		flags |= wire.FlagReadOnly
	}
	d := m.device(o)
	if o.Connections > 1 && flags&wire.FlagCanMultiConn == 0 {
		d.log.Warn("the server does not promise that connections agree, so it gets one", "asked", o.Connections)
		d.options.Connections = 1
	}
	d.backend.BlockSizes, d.blockSize = sizes, o.BlockSize
	d.flags, d.readOnly = nbdnl.Flags(flags), flags&wire.FlagReadOnly != 0
	d.source = &remoteSource{remote: r, device: d}
	d.conns.remote = true
	d.size.Store(r.Size())
	return d, d.open()
}

// smallestLimit is the least to which the kernel's requests can be limited, in bytes: a page
// (max_sectors_kb).
const smallestLimit = 4096

// remoteSource makes connections to a server that are the kernel's.
type remoteSource struct {
	remote Remote
	device *Device
}

func (s *remoteSource) connect(ctx context.Context, n int) (*sockets, error) {
	made := new(sockets)
	for range n {
		w, err := s.one(ctx)
		if err != nil {
			made.close()
			return nil, err
		}
		made.kernel = append(made.kernel, w.socket)
		made.conns = append(made.conns, w)
	}
	return made, nil
}

func (s *remoteSource) one(ctx context.Context) (*watched, error) {
	nc, err := s.remote.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("blockdev: no connection to the server: %w", err)
	}
	d := s.device
	w, err := newWatched(nc, d.ends)
	if err != nil {
		return nil, fmt.Errorf("blockdev: connection to the server: %w", err)
	}
	if d.machine.breaksSends() {
		enlargeSendBuffer(w.socket, bigSendBuffer, d.log)
	}
	return w, nil
}

// endPatience is how long the kernel may take to show that it has ended a device all of whose
// connections it has ended.
const endPatience = 100 * time.Millisecond

// ends reports whether the device is being ended by the kernel, which tells nobody here but the
// server: its connections look lost.
func (d *Device) ends() bool {
	select {
	case <-d.conns.attached:
	default:
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	return d.client.WaitFree(ctx, d.index) == nil
}

// A watched connection is the kernel's. It is watched here for its end.
type watched struct {
	socket *os.File      // nil: the connection is not seen here, or had ended before it could be
	unseen bool          // it is not seen here
	since  time.Time     // when it had ended, if that is known
	ends   func() bool   // reports whether the device is being ended
	hungUp chan struct{} // closed when the connection has ended
	stop   func()        // ends the watch

	disconnected atomic.Bool
	closing      sync.Once
	closed       chan struct{}
}

// newWatched watches nc, which is used up.
func newWatched(nc net.Conn, ends func() bool) (*watched, error) {
	socket, err := takeSocket(nc)
	if err != nil {
		return nil, err
	}
	return watch(socket, ends)
}

// watch watches the connection of a socket, which is closed on error.
func watch(socket *os.File, ends func() bool) (_ *watched, err error) {
	w := &watched{socket: socket, ends: ends, hungUp: make(chan struct{}), closed: make(chan struct{})}
	if w.stop, err = rawio.WatchHangup(socket, func() { close(w.hungUp) }); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	return w, nil
}

// errHungUp is all that is known of the end of most connections: the kernel has read the reason.
var errHungUp = errors.New("the server has ended it, or did not answer in time")

// Transmit waits for the end of the connection.
func (w *watched) Transmit() error {
	select {
	case <-w.closed:
		return net.ErrClosed
	case <-w.hungUp:
	}
	if w.socket == nil && !w.unseen {
		return errLostBefore
	}
	if w.ends() {
		w.disconnected.Store(true)
		return nil
	}
	if w.unseen {
		return errNotSeen
	}
	if err := socketError(w.socket); err != nil {
		return err
	}
	return errHungUp
}

// Close ends the connection, also for the kernel and the server: what was not sent will not be,
// lest it reach the server after what is sent over the next connection.
func (w *watched) Close() error {
	w.closing.Do(func() {
		close(w.closed)
		w.stop()
		if w.socket != nil {
			_ = resetSocket(w.socket) // It may have ended.
			w.socket.Close()
		}
	})
	return nil
}

// Disconnected reports whether the connection has ended with its device.
func (w *watched) Disconnected() bool { return w.disconnected.Load() }

// Stopped returns a channel that is closed when the connection has ended. Transmit returns when it
// is known whether the device has, too.
func (w *watched) Stopped() <-chan struct{} { return w.hungUp }

// Away, Absence, Idle and Stats say that nothing of it is done here.
func (w *watched) Away() bool              { return false }
func (w *watched) Absence() time.Duration  { return 0 }
func (w *watched) Idle() bool              { return false }
func (w *watched) Stats() (s server.Stats) { return s }

var errServerless = fmt.Errorf("the kernel speaks with the server itself, where alone it can be changed: %w", errors.ErrUnsupported)

// served returns an error if the device's requests are not served here.
func (d *Device) served() error {
	if d.export == nil {
		return fmt.Errorf("blockdev: %s: %w", d.Path(), errServerless)
	}
	return nil
}
