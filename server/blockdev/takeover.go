package blockdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/server"
)

// A MismatchError says in what a device, or the backend for it, is not what it has to be, for a
// process to go on with it. There may be several in one error.
type MismatchError struct {
	Index     int
	Setting   string // "identifier", "incarnation", "size", "backend size", "export size", "flush" and so on
	Want, Got string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("blockdev: %s: %s is %s instead of %s", nbdnl.Path(e.Index), e.Setting, e.Got, e.Want)
}

// Adopt goes on with a device that another process has handed over, with b in the place of its
// backend there: what Document and Files of a Handover were. Of the options it heeds Client,
// MaxInFlight, Recoverable and Logger; the others are as the device is. The backend must stay open
// until Done.
//
// What the kernel shows and what b can do is compared with the Document first. If it differs the
// error has a *MismatchError for each difference, and the device still waits, for the process that
// has handed it over or for another one that adopts it. So it does after any other error. begin is
// called when all is well, just before the first request is executed: that the other process has
// let go of the device is for it to see to. With an error of begin nothing was read, and Adopt
// returns that. nil: nothing is called.
//
// files belong to Adopt, but for those behind the connections and the lease, which the program has
// added by itself (HandOverOptions.Files).
func Adopt(
	ctx context.Context, doc Document, files []*os.File, b backends.Backend, o Options, begin func() error,
) (*Device, error) {
	return machine{}.takeOver(ctx, doc, files, b, o, begin)
}

// check says what is wrong with a document that came with that many files.
func (doc *Document) check(files int) error {
	need, version := doc.own(), DocumentVersion
	if doc.Remote {
		version = RemoteDocumentVersion
	}
	switch {
	case doc.Version != version:
		return fmt.Errorf("blockdev: a document of version %d, and of such a device this program understands %d: "+
			"use one that understands it, too", doc.Version, version)
	case doc.checkConnections() != nil:
		return doc.checkConnections()
	case doc.Remote && slices.ContainsFunc(doc.Connections, HandedConnection.received):
		return fmt.Errorf("blockdev: %s: requests were received that the kernel has sent to another server",
			nbdnl.Path(doc.Index))
	case files < need:
		return fmt.Errorf("blockdev: %s came with %d descriptors, and has %d", nbdnl.Path(doc.Index), files, need)
	}
	return nil
}

// checkConnections says what is wrong with the number of connections, or the index.
func (doc *Document) checkConnections() error {
	if doc.Index < 0 || len(doc.Connections) == 0 || len(doc.Connections) > maxConnections {
		return fmt.Errorf("blockdev: a document of index %d with %d connections", doc.Index, len(doc.Connections))
	}
	return nil
}

// received reports whether bytes were received over it, and not executed.
func (c HandedConnection) received() bool { return len(c.Unread) > 0 }

// Extra returns what of the descriptors that came with the document the program has added by itself
// (HandOverOptions.Files).
func (doc *Document) Extra(files []*os.File) []*os.File {
	return files[min(doc.own(), len(files)):]
}

// own returns how many descriptors the document speaks of.
func (doc *Document) own() (n int) {
	if n = doc.alive(); doc.Leased {
		n++
	}
	return n
}

// alive returns how many connections it has descriptors of.
func (doc *Document) alive() (n int) {
	for _, c := range doc.Connections {
		if !c.Dead {
			n++
		}
	}
	return n
}

func (m machine) takeOver(
	ctx context.Context, doc Document, files []*os.File, b backends.Backend, o Options, begin func() error,
) (*Device, error) {
	return m.inherit(ctx, doc, files, m.serving(b), o, begin)
}

// inherit is takeOver, with what makes the Device.
func (m machine) inherit(
	ctx context.Context, doc Document, files []*os.File, with maker, o Options, begin func() error,
) (*Device, error) {
	own := files[:len(files)-len(doc.Extra(files))]
	defer func() { closeAll(own) }()
	if err := doc.check(len(files)); err != nil {
		return nil, err
	}
	if err := doc.isFor(with.remote); err != nil {
		return nil, err
	}
	s := doc.existing()
	giveBack, begun := func() error { return nil }, false
	var lease *claim.Lease
	if doc.Leased {
		last := len(own) - 1
		f := own[last]
		own = own[:last]
		var err error
		if lease, err = m.claims(o).Inherit(doc.Index, f); err != nil {
			return nil, fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err)
		}
		giveBack = func() error { return m.giveBack(lease, begun) }
	}
	var err error
	if s.links, err = doc.links(own); err != nil {
		return nil, errors.Join(err, giveBack())
	}
	d, err := m.goOn(ctx, s, with, o, func(d *Device) error {
		d.lease = lease
		d.losses.take(doc.Lost, doc.Open)
		d.conns.replacedBefore(doc.Replaced)
		if doc.Unseen {
			d.unseen = newUnseen(d)
		}
		if begin != nil {
			if err := begin(); err != nil {
				return err
			}
		}
		begun = true
		return nil
	}, giveBack)
	if err != nil {
		closeLinks(s.links)
		return nil, err
	}
	before := make([]server.Stats, len(doc.Connections))
	for i := range doc.Connections {
		before[i] = doc.Connections[i].Stats
	}
	d.conns.servedBefore(before)
	return d, nil
}

// giveBack gives up the lease of a device that another process had, or has; nil: there is none.
// begun tells that the device is served here.
func (m machine) giveBack(lease *claim.Lease, begun bool) error {
	switch {
	case lease == nil:
		return nil
	case !begun || m.system.IncarnationOf(lease.Index()) != 0:
		return lease.Leave() // The other process has the lease as long as it has the device.
	default:
		return lease.Release()
	}
}

// claims is where leases are.
func (m machine) claims(o Options) claim.Dir {
	if o.Client != nil {
		return o.Client.Claims()
	}
	return claim.Dir(m.system.StateDir)
}

// links makes connections of descriptors.
func (doc *Document) links(files []*os.File) (links []link, err error) {
	for _, c := range doc.Connections {
		l := link{unread: c.Unread, since: c.DeadSince}
		if !c.Dead {
			if doc.Remote {
				// A net.Conn would have it not block, for all who have it.
				l.socket, err = copySocket(files[0])
			} else {
				l.conn, err = net.FileConn(files[0])
			}
			if err != nil {
				closeLinks(links)
				return nil, fmt.Errorf("blockdev: %s: descriptor of a connection: %w", nbdnl.Path(doc.Index), err)
			}
			files = files[1:]
		}
		links = append(links, l)
	}
	return links, nil
}

func closeLinks(links []link) {
	for _, l := range links {
		if l.conn != nil {
			l.conn.Close()
		}
		if l.socket != nil {
			l.socket.Close()
		}
	}
}
