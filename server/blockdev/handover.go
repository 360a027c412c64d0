package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// ErrHandedOver is why a device has ended, here, that another process goes on with.
var ErrHandedOver = errors.New("blockdev: the device was handed over to another process")

// These are the versions of the Documents which this package writes. Those of another one it
// refuses.
const (
	DocumentVersion = 1
	// RemoteDocumentVersion is that of the devices of ConnectRemote. A program that understands
	// DocumentVersion only must not take the kernel's connections for its own, and read from them.
	RemoteDocumentVersion = 2
	// KeptDocumentVersion is that of what Keep returns: its connections are served by somebody, and
	// are for Recover only.
	KeptDocumentVersion = 3
)

// A Document is what a process has to know of a device to go on with it, beside the descriptors. It
// is plain data, written as JSON. What a later version adds without another Version can be left out
// by an earlier one.
type Document struct {
	Version     int               `json:"version"`
	Index       int               `json:"index"`
	Incarnation nbdnl.Incarnation `json:"incarnation"` // 0: not known
	Identifier  string            `json:"identifier"`
	Size        int64             `json:"size"`       // in bytes
	BlockSize   int               `json:"block_size"` // in bytes
	Flags       nbdnl.Flags       `json:"flags"`      // that the kernel was told
	Timeout     time.Duration     `json:"timeout"`    // in nanoseconds, as are all durations here
	DeadTimeout time.Duration     `json:"dead_timeout"`
	// Remote tells that the device is one of ConnectRemote: the connections are the kernel's, of
	// which there are copies.
	Remote bool `json:"remote,omitempty"`
	// Unseen tells that some of those that are Dead may not be: the kernel has a connection, and
	// nobody a descriptor of it.
	Unseen bool `json:"unseen,omitempty"`
	// Replaced is that of Device.Outage, of a device of ConnectRemote.
	Replaced int64 `json:"replaced,omitempty"`
	// Connections are in the order in which the kernel knows them.
	Connections []HandedConnection `json:"connections"`
	// Lost is what was lost since the device was connected, and Open what of it nobody has
	// acknowledged; nil: nothing.
	Lost *HandedLoss `json:"lost,omitempty"`
	Open *HandedLoss `json:"open,omitempty"`
	// Leased tells that there is a descriptor of the lease of the index (claim.Lease), behind those
	// of the connections. In a Document of Keep there is none: the lease ends with the process.
	Leased bool `json:"leased,omitempty"`
	// Note is HandOverOptions.Note.
	Note json.RawMessage `json:"note,omitempty"`
}

// A HandedConnection is one of the connections of a device.
type HandedConnection struct {
	// Dead tells that it has no descriptor, and is to be replaced.
	Dead bool `json:"dead,omitempty"`
	// DeadSince is since when, of a device of ConnectRemote; zero: it is not known.
	DeadSince time.Time `json:"dead_since,omitzero"`
	// Unread was received and not executed.
	Unread []byte `json:"unread,omitempty"`
	// Slot and Use are where it is in the ledger, of a Document of Keep. Use is 0 of a connection
	// that is in none.
	Slot int    `json:"slot,omitempty"`
	Use  uint64 `json:"use,omitempty"`
	// Stats are what was served over it.
	Stats server.Stats `json:"stats"`
}

// HandOverOptions say how a device is handed over. The zero value is ready to use.
type HandOverOptions struct {
	// Unsynced leaves out to sync the backend: what it has been given is where the other process
	// finds it without that, as in the page cache, in shared memory, or on a server. It means
	// nothing for a device of ConnectRemote.
	Unsynced bool
	// Note and Files go along for the two programs to agree on: which backend it is, and what that
	// has open. Note is JSON, or nil. Files stay the caller's.
	Note  json.RawMessage
	Files []*os.File
	// Still is called when nothing is asked of the backend any more, and returns what is known only
	// then, which goes along in the place of Note and Files. With an error the device goes on here.
	// nil: all is known before.
	Still func() (note json.RawMessage, files []*os.File, err error)
}

// still has the options complete. To be called while the device stands still.
func (o *HandOverOptions) still() (err error) {
	if o.Still != nil {
		if o.Note, o.Files, err = o.Still(); err != nil {
			return err
		}
	}
	if o.Note != nil && !json.Valid(o.Note) {
		return errors.New("the note is not JSON")
	}
	return nil
}

// A Handover is a device on its way to another process. Nothing is asked of the backend meanwhile,
// and what is asked of the device waits, for its Timeout at most: the kernel loses patience then.
// Of a device of ConnectRemote nothing waits but the replacement of a connection that is lost. It
// ends with Resume, Complete or Reconnect, of which the first that is called counts. What a Flush
// finds out that was begun before it stays here.
type Handover struct {
	// Document and Files are what the other process needs (Adopt). Files are the connections that
	// are alive, in the order of the Document, the lease if there is one, and
	// HandOverOptions.Files. They are closed with the end of the Handover, but for the last.
	Document Document
	Files    []*os.File

	device *Device
	hold   *server.Hold // nil: the kernel speaks with another server
	give   func()       // lets go of what nobody else may do meanwhile
	own    int          // how many of Files are closed here
	until  time.Time
	ended  atomic.Bool
}

// HandOver has the device stand still, and returns what another process needs to go on with it
// (Adopt): the connections to the kernel, which notices nothing. Every request that was read is
// answered then, on all connections, and what was received beyond goes along, with the statistics,
// the losses and the lease. How long each request has been on its way does not: its time begins
// anew.
//
// The backend is synced before, while I/O goes on, and once more, unless HandOverOptions.Unsynced
// says that there is no need. The requests in flight and the second sync may take half of Timeout,
// or until ctx ends. When either is over, the error says so, and the device goes on as if nothing
// had been, as it does after any other error: errors.ErrUnsupported of a device by ioctls, which
// the kernel ends with the process that has connected it.
//
// What is asked of the device waits until the Handover ends, each request for Timeout at the most;
// so do calls that change or end it. HandOverTo does all of it over a Unix socket.
//
// Of a device of ConnectRemote there is nothing to be answered, nor synced: the kernel and the
// server go on. Copies of the kernel's connections go along (AdoptRemote). They are watched here
// until Complete, and none is replaced; HandOver waits for replacements that are under way.
func (d *Device) HandOver(ctx context.Context, o HandOverOptions) (*Handover, error) {
	h, err := d.handOver(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("blockdev: %s is not handed over: %w", d.Path(), err)
	}
	return h, nil
}

func (d *Device) handOver(ctx context.Context, o HandOverOptions) (_ *Handover, err error) {
	switch {
	case d.Mode() == nbdnl.ModeIoctl:
		return nil, fmt.Errorf("a device by ioctls ends with the process that has connected it: %w",
			errors.ErrUnsupported)
	}
	if d.export != nil && !o.Unsynced {
		// I/O goes on meanwhile, and all the rest, so this may take as long as it does.
		if err := d.export.Sync(ctx); err != nil {
			return nil, err
		}
	}
	give, err := d.standStill(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			give()
		}
	}()
	until := time.Now().Add(d.Timeout() / 2)
	ctx, cancel := context.WithDeadlineCause(ctx, until, errors.New("the backend takes too long"))
	defer cancel()
	var hold *server.Hold
	if d.export != nil {
		hold, err = d.export.Hold(ctx, !o.Unsynced)
	} else {
		err = d.there(ctx)
	}
	if err != nil {
		return nil, err
	}
	doc, files, err := d.describe(hold)
	if err == nil {
		if err = o.still(); err != nil {
			closeAll(files)
		}
	}
	if err != nil {
		if hold != nil {
			hold.Release()
		}
		return nil, err
	}
	doc.Note = o.Note
	return &Handover{
		Document: doc, Files: append(files, o.Files...), device: d, hold: hold, give: give, own: len(files),
		until: until,
	}, nil
}

// standStill has nobody end the device, change its settings, or replace its connections.
func (d *Device) standStill(ctx context.Context) (give func(), err error) {
	select {
	case d.ending <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("it is being ended by another call: %w", context.Cause(ctx))
	}
	err = d.change(ctx)
	if err == nil && d.ended { // Something of it may still be in the backend.
		d.unchange()
		err = fmt.Errorf("it has been closed: %w", nbdnl.ErrNotConnected)
	}
	if err != nil {
		<-d.ending
		return nil, err
	}
	replaceAgain, err := d.conns.keepAsTheyAre(ctx)
	if err != nil {
		d.unchange()
		<-d.ending
		return nil, err
	}
	return func() {
		replaceAgain()
		d.unchange()
		<-d.ending
	}, nil
}

// describe returns what there is to know of the device, while it is held, and copies of its
// descriptors.
func (d *Device) describe(hold *server.Hold) (doc Document, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	doc = d.document()
	if d.export == nil {
		doc.Version = RemoteDocumentVersion
	}
	for _, c := range d.conns.present() {
		handed, f, err := hand(c, hold)
		if err != nil {
			return doc, files, err
		}
		if f != nil {
			files = append(files, f)
		}
		doc.Connections = append(doc.Connections, handed)
	}
	doc.Lost, doc.Open = d.losses.hand()
	if d.lease != nil {
		f, err := d.lease.File()
		if err != nil {
			return doc, files, err
		}
		doc.Leased, files = true, append(files, f)
	}
	return doc, files, nil
}

// document returns what there is to know of the device but for its connections.
func (d *Device) document() Document {
	doc := Document{
		Version: DocumentVersion, Index: d.index, Incarnation: d.incarnation, Identifier: d.Identifier(),
		Size: d.Size(), BlockSize: d.blockSize, Flags: d.flags,
	}
	doc.Timeout, doc.DeadTimeout = d.conns.timeouts()
	if d.export == nil {
		doc.Remote, doc.Unseen, doc.Replaced = true, d.unseen != nil, d.Outage().Replaced
	}
	return doc
}

// hand returns what there is to know of a connection, and a copy of its descriptor if it is alive.
func hand(c present, hold *server.Hold) (handed HandedConnection, f *os.File, err error) {
	if w, ok := c.conn.(*watched); ok {
		return w.hand(c.dead)
	}
	handed = HandedConnection{Dead: true, Stats: c.stats}
	handed.Stats.InFlight, handed.Stats.Oldest = 0, 0
	here := c.conn.(served) // There is an export.
	unread, ok := hold.Unread(here.Conn)
	if !ok {
		return handed, nil, nil
	}
	nc, ok := here.nc.(interface{ File() (*os.File, error) })
	if !ok {
		return handed, nil, nil // One that was dead when it was adopted.
	}
	if f, err = nc.File(); err != nil {
		return handed, nil, err
	}
	handed.Dead, handed.Unread = false, unread
	return handed, f, nil
}

// Resume has the device served here, as if nothing had been. Nobody may have begun to serve it from
// what was in the Handover.
func (h *Handover) Resume() {
	if h.end() {
		if h.hold != nil {
			h.hold.Release()
		}
		h.give()
	}
}

// Complete leaves the device to the process that serves it now, or will: here it is Done, with
// ErrHandedOver, and there is nothing left to be ended, nor a loss to be told. The backend may be
// closed, if that leaves alone what the other process uses. The error is of letting go, and changes
// nothing.
func (h *Handover) Complete() error {
	if !h.end() {
		return nil
	}
	defer h.give()
	d := h.device
	d.conns.handOver()
	if h.hold != nil {
		h.hold.Leave()
	}
	<-d.conns.done // Nothing is in flight.
	d.losses.forget()
	d.ended = true
	return d.release()
}

// Reconnect has the device served here with new connections, in the place of those that were handed
// over. It is for when a process has died that may have begun to serve it: what that has not
// answered the kernel sends again, when the Timeout of each request is up. Without DeadTimeout the
// device ends.
//
// A device of ConnectRemote keeps its connections, to which nobody has done anything: Reconnect is
// Resume.
func (h *Handover) Reconnect() {
	if h.end() {
		if h.hold != nil {
			h.hold.Leave() // With that they count as lost.
		}
		h.give()
	}
}

// end begins the end of the handover, and reports whether it is the first.
func (h *Handover) end() bool {
	if h.ended.Swap(true) {
		return false
	}
	closeAll(h.Files[:h.own])
	return true
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
