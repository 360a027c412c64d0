package blockdev

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Keep returns what another process, the keeper, needs to hold so that a successor can go on with
// the device at once when this process dies (Recover): a Document, and descriptors of the
// connections that are alive, in the order of the Document, and of the ledger. Nothing stands
// still, and nothing changes, but for this: as long as somebody has the descriptors of a connection
// the kernel does not see that this process has died, and what is asked of the device waits.
//
// Keep is to be called again after each change that Changes tells of, and what it has returned
// before is to be closed then. What is out of date does no harm: a connection of it that was
// replaced meanwhile counts as dead. But one that it does not have is cut by Recover, which also
// refuses a Document with a size that the device has no more.
//
// Of a device of ConnectRemote there is no ledger, and nothing waits: the kernel and the server go
// on without this process, and RecoverRemote has the connections watched again. One that the
// Document does not have it finds all the same.
//
// The descriptors are the caller's. The lease of the index is not among them: it ends with this
// process, and tells that to others.
//
// Options.Recoverable must have been set, but of a device of ConnectRemote. The error matches
// errors.ErrUnsupported of a device by ioctls, which ends with its process.
func (d *Device) Keep() (Document, []*os.File, error) {
	doc, files, err := d.keep()
	if err != nil {
		closeAll(files)
		return Document{}, nil, fmt.Errorf("blockdev: %s can't be kept: %w", d.Path(), err)
	}
	return doc, files, nil
}

func (d *Device) keep() (doc Document, files []*os.File, err error) {
	switch {
	case d.Mode() == nbdnl.ModeIoctl:
		return doc, nil, fmt.Errorf("a device by ioctls ends with the process that has connected it: %w",
			errors.ErrUnsupported)
	case d.export != nil && d.ledger == nil:
		return doc, nil, errors.New("it was made without Options.Recoverable")
	}
	select {
	case <-d.Done():
		return doc, nil, fmt.Errorf("it has ended: %w", errors.Join(nbdnl.ErrNotConnected, d.Err()))
	default:
	}
	doc = d.document()
	doc.Version, doc.Leased = KeptDocumentVersion, d.lease != nil
	for _, c := range d.conns.present() {
		kept, f, err := c.keep()
		if err != nil {
			return doc, files, err
		}
		if f != nil {
			files = append(files, f)
		}
		doc.Connections = append(doc.Connections, kept)
	}
	if d.export == nil {
		return doc, files, nil
	}
	f, err := d.ledger.copy()
	if err != nil {
		return doc, files, err
	}
	return doc, append(files, f), nil
}

// keep returns what a keeper has to know of a connection, and a copy of its descriptor if it is
// alive. One that dies meanwhile counts as dead.
func (c present) keep() (HandedConnection, *os.File, error) {
	if w, ok := c.conn.(*watched); ok {
		return w.hand(c.dead)
	}
	dead := HandedConnection{Dead: true}
	here := c.conn.(served) // There is an export.
	nc, ok := here.nc.(*net.UnixConn)
	if !ok || !c.dead.IsZero() {
		return dead, nil, nil
	}
	f, err := nc.File()
	switch {
	case errors.Is(err, net.ErrClosed):
		return dead, nil, nil
	case err != nil:
		return dead, nil, err
	}
	kept := HandedConnection{}
	if here.entry != nil {
		kept.Slot, kept.Use = here.entry.number, here.entry.use
	}
	return kept, f, nil
}
