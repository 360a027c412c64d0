package blockdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// Recover goes on with a device whose process has died, with b in the place of its backend there:
// doc and files are what Device.Keep has returned last, which a keeper has held. A connection that
// stood still when the process died, with nothing begun that was not answered, goes on as it is,
// and the kernel notices nothing. Any other is cut, and another one takes its place: new requests
// are served at once then, and what was in flight on it the kernel sends again when the timeout of
// each request is up, and not before. Nothing is executed again from what the process knew. Recover
// returns when all connections are alive; Device.Recovered tells which way each went.
//
// The process must be dead, with all its threads: an end that was waited for (wait(2), a pidfd that
// is readable) is, and a signal that was sent is not. Nobody else may serve the device, nor write
// to what is behind b. Where the index was leased, Recover takes the lease, and the error matches
// nbdnl.ErrBusy as long as the process has it, or another one that was quicker.
//
// Of the options it heeds Client, MaxInFlight, Recoverable, Logger, and DeadTimeout: if that is not
// 0 it becomes that of the device. The others are as the device is. If no connection stood still,
// one of the two must not be 0, or requests would fail when the connections are cut.
//
// What the kernel shows and what b can do is compared with doc first. If it differs the error has a
// *MismatchError for each difference, and the device still waits, with its connections as they are.
// So it does after any other error up to there; files stay the caller's, so it is for the caller to
// keep them until Recover has succeeded. If ctx ends later, while connections are replaced, all are
// cut, and the device waits for DeadTimeout. Whether it has failed writes before is not known, and
// no Loss.
//
// With success doc and files have served: no connection of theirs counts as standing still any
// more. The keeper needs those of the new device (Device.Keep), and closes these. The error matches
// errors.ErrUnsupported of a device by ioctls, and of one of ConnectRemote, for which is
// RecoverRemote.
func Recover(
	ctx context.Context, doc Document, files []*os.File, b backends.Backend, o Options,
) (*Device, error) {
	return machine{}.recover(ctx, doc, files, b, o)
}

// Cut cuts those connections of a kept device that Recover will replace, which takes no time: what
// is asked of the device from then on waits for another connection, and is served as soon as there
// is one. Without it, what is asked before Recover goes where nobody reads it, and waits for its
// timeout. It is for the keeper, as soon as the process is dead, with all its threads, and before
// it starts the one that calls Recover. files stay the caller's. A device of ConnectRemote has none
// to cut.
func (doc *Document) Cut(files []*os.File) error {
	if doc.Remote {
		return nil
	}
	if err := doc.checkKept(len(files)); err != nil {
		return err
	}
	r, err := doc.recovery(files)
	if err != nil {
		return err
	}
	closeLinks(r.links)
	if err := r.shut(); err != nil {
		return fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err)
	}
	return nil
}

// Recovered returns how many connections Recover has gone on with as they were, and how many it has
// replaced. Of a device that was made otherwise both are 0.
func (d *Device) Recovered() (kept, replaced int) { return d.recovered.kept, d.recovered.replaced }

// A recovery is what there is to be done of the connections of a device.
type recovery struct {
	links          []link     // of those that stood still; the others are dead
	cut            []*os.File // descriptors of those that did not
	records        []*record  // of all
	kept, replaced int
}

func (m machine) recover(
	ctx context.Context, doc Document, files []*os.File, b backends.Backend, o Options,
) (*Device, error) {
	if err := doc.checkKept(len(files)); err != nil {
		return nil, err
	}
	lease, err := m.leaseAgain(doc, o)
	if err != nil {
		return nil, err
	}
	begun := false
	giveBack := func() error { return m.giveBack(lease, begun) }
	r, err := doc.recovery(files)
	if err != nil {
		return nil, errors.Join(err, giveBack())
	}
	s := doc.existing()
	s.links = r.links
	var u nbdnl.Update
	if o.DeadTimeout != 0 {
		s.deadTimeout, u.DeadConnTimeout = o.DeadTimeout, &o.DeadTimeout
	}
	d, err := m.adopt(ctx, s, b, o, func(d *Device) error {
		if r.kept == 0 && s.deadTimeout == 0 {
			return fmt.Errorf("blockdev: %s is not recovered without Options.DeadTimeout: "+
				"no connection stood still, and the kernel would wait for no other", nbdnl.Path(doc.Index))
		}
		if u.DeadConnTimeout != nil {
			if err := d.client.Reconfigure(ctx, doc.Index, doc.Identifier, u); err != nil {
				return err
			}
		}
		if err := r.begin(); err != nil {
			return fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err)
		}
		d.lease, d.recovered, begun = lease, r, true
		return nil
	}, giveBack)
	if err != nil {
		closeLinks(r.links)
		return nil, err
	}
	return d.awaitOrCut(ctx, r.replaced)
}

// checkKept says what is wrong with a document that came with that many files.
func (doc *Document) checkKept(files int) error {
	path := nbdnl.Path(doc.Index)
	if err := doc.isFor(false); err != nil {
		return err
	}
	if err := doc.checkKeptVersion(); err != nil {
		return err
	}
	if err := doc.checkConnections(); err != nil {
		return err
	}
	need := doc.alive() + 1 // the ledger
	for _, c := range doc.Connections {
		if c.Slot < 0 || c.Slot >= maxSlots {
			return fmt.Errorf("blockdev: %s has a connection in slot %d of a ledger of %d", path, c.Slot, maxSlots)
		}
	}
	if files != need {
		return fmt.Errorf("blockdev: %s came with %d descriptors, and has %d", path, files, need)
	}
	return nil
}

// checkKeptVersion says whether it is one of Keep that is understood.
func (doc *Document) checkKeptVersion() error {
	if doc.Version != KeptDocumentVersion {
		return fmt.Errorf("blockdev: a document of version %d, and of kept devices this program understands %d: "+
			"use what Device.Keep has returned", doc.Version, KeptDocumentVersion)
	}
	return nil
}

// leaseAgain takes the lease that a dead process had; nil: it had none.
func (m machine) leaseAgain(doc Document, o Options) (*claim.Lease, error) {
	if !doc.Leased {
		return nil, nil
	}
	lease, err := m.claims(o).TryLease(doc.Index)
	if err != nil {
		return nil, fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err)
	}
	if left := lease.Left(); left != doc.Identifier {
		return nil, errors.Join(&MismatchError{doc.Index, "identifier", doc.Identifier, left}, lease.Leave())
	}
	return lease, nil
}

// recovery looks at what is left of the connections, and changes nothing.
func (doc *Document) recovery(files []*os.File) (r recovery, err error) {
	ledger := files[len(files)-1]
	defer func() {
		if err != nil {
			closeLinks(r.links)
			err = fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err)
		}
	}()
	for i, c := range doc.Connections {
		r.links = append(r.links, link{})
		if c.Dead {
			continue
		}
		f, record := files[0], recordOf(ledger, c)
		files = files[1:]
		r.records = append(r.records, record)
		still, err := record.still()
		if err != nil {
			return r, fmt.Errorf("connection %d: %w", i, err)
		}
		nc, err := net.FileConn(f)
		if err != nil {
			return r, fmt.Errorf("descriptor of connection %d: %w", i, err)
		}
		socket, ok := nc.(*net.UnixConn)
		if !ok {
			nc.Close()
			return r, fmt.Errorf("descriptor of connection %d is that of a %T", i, nc)
		}
		hung, err := hungUp(socket)
		if err != nil {
			nc.Close()
			return r, fmt.Errorf("connection %d: %w", i, err)
		}
		if still && !hung {
			r.links[i].conn = nc
			r.kept++
			continue
		}
		nc.Close()
		r.cut = append(r.cut, f)
	}
	r.replaced = len(r.links) - r.kept
	return r, nil
}

// begin has the kernel notice which connections are dead, and nobody else go on with the others.
func (r *recovery) begin() error {
	for _, record := range r.records {
		if err := record.spend(); err != nil {
			return err
		}
	}
	return r.shut()
}

// shut has the kernel notice which connections are dead.
func (r *recovery) shut() error {
	for _, f := range r.cut {
		if err := resetSocket(f); err != nil {
			return err
		}
	}
	return nil
}
