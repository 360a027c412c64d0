package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/wire"
)

// AdoptRemote is Adopt for a device of ConnectRemote (Document.Remote): its connections are watched
// here from now on, and r makes those that replace lost ones. No request notices, and the process
// that hands it over may watch them, too, until it lets go. r must be what the device is of: its
// size, and whatever the kernel makes use of.
func AdoptRemote(
	ctx context.Context, doc Document, files []*os.File, r Remote, o Options, begin func() error,
) (*Device, error) {
	return machine{}.takeOverRemote(ctx, doc, files, r, o, begin)
}

func (m machine) takeOverRemote(
	ctx context.Context, doc Document, files []*os.File, r Remote, o Options, begin func() error,
) (*Device, error) {
	return m.inherit(ctx, doc, files, m.watching(r), o, begin)
}

// watching makes Devices of which the kernel speaks with the server of r.
func (m machine) watching(r Remote) maker {
	return maker{true, func(o Options) (*Device, error) {
		if r != nil && r.Flags()&wire.FlagCanMultiConn == 0 {
			o.Connections = 1 // If there are more, that is a difference.
		}
		return m.newRemoteDevice(r, o)
	}}
}

// there returns an error if the kernel has ended the device, of which it tells nobody here.
func (d *Device) there(ctx context.Context) error {
	st, err := d.client.Status(ctx, d.index)
	if err == nil && !st.Connected() {
		err = fmt.Errorf("it has ended: %w", nbdnl.ErrNotConnected)
	}
	return err
}

// isFor says why a device can't go on with the export of another server, or with a backend.
func (doc *Document) isFor(remote bool) error {
	switch {
	case doc.Remote && !remote:
		return fmt.Errorf("blockdev: %s: the kernel speaks with another server, whose place no backend can take: %w",
			nbdnl.Path(doc.Index), errors.ErrUnsupported)
	case !doc.Remote && remote:
		return fmt.Errorf("blockdev: %s is served by a process, whose place no export of another server can take: %w",
			nbdnl.Path(doc.Index), errors.ErrUnsupported)
	}
	return nil
}

// watch returns what watches existing connections.
func (d *Device) watch(ends []link) ([]transmitter, error) {
	conns := make([]transmitter, len(ends))
	for i, end := range ends {
		if end.socket == nil {
			conns[i] = lostBefore(end.since, d.ends)
			continue
		}
		w, err := watch(end.socket, d.ends)
		if err != nil {
			letGo(conns[:i])
			return nil, fmt.Errorf("blockdev: %s: connection to the server: %w", nbdnl.Path(d.index), err)
		}
		conns[i] = w
	}
	return conns, nil
}

// errLostBefore is all that is known of the end of a connection that another process has noticed.
var errLostBefore = errors.New("it was lost before the device was handed over")

// lostBefore stands in for a connection that had ended before it could be watched here.
func lostBefore(since time.Time, ends func() bool) *watched {
	w := &watched{since: since, ends: ends, hungUp: make(chan struct{}), closed: make(chan struct{}), stop: func() {}}
	close(w.hungUp)
	return w
}

// letGo ends the watch over those of the connections that are watched. They stay open for all
// others who have them.
func letGo(conns []transmitter) {
	for _, c := range conns {
		if w, ok := c.(*watched); ok {
			w.letGo()
		}
	}
}

// letGo is Close that leaves the connection as it is, for the kernel and the server.
func (w *watched) letGo() {
	w.closing.Do(func() {
		close(w.closed)
		w.stop()
		if w.socket != nil {
			w.socket.Close()
		}
	})
}

// hand returns what there is to know of the connection, and a copy of its descriptor. dead is since
// when the connection is dead, if it is. A dead one goes along, too, until it was reset here:
// whoever replaces it resets it before.
func (w *watched) hand(dead time.Time) (HandedConnection, *os.File, error) {
	if w.socket != nil {
		f, err := copySocket(w.socket)
		if err == nil || !w.wasClosed() {
			return HandedConnection{}, f, err
		}
	}
	return HandedConnection{Dead: true, DeadSince: dead.UTC()}, nil, nil
}

// wasClosed reports whether Close was called, and returns when that has reset the connection.
func (w *watched) wasClosed() bool {
	select {
	case <-w.closed:
		w.Close()
		return true
	default:
		return false
	}
}
