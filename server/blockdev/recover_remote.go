package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/wire"
)

// RecoverRemote is Recover for a device of ConnectRemote: doc and files are what Device.Keep has
// returned last, r makes the connections that replace lost ones. The kernel and the server have
// gone on without the process, so no request notices, and nothing waits but what is to go over a
// connection that was lost meanwhile. RecoverRemote does not wait until that is replaced. Of a
// connection that doc does not have RecoverRemote takes what the kernel does for an answer: it is
// alive if the kernel takes no other in its place, and taken for dead when the kernel tells that
// one of the device has died. That is told in the initial network namespace only.
//
// r must be what the device is of: its size, and whatever the kernel makes use of. What differs is
// named, as by Recover, and nothing has changed then. DeadTimeout of the options is not heeded; it
// is as the device is.
func RecoverRemote(ctx context.Context, doc Document, files []*os.File, r Remote, o Options) (*Device, error) {
	return machine{}.recoverRemote(ctx, doc, files, r, o)
}

func (m machine) recoverRemote(
	ctx context.Context, doc Document, files []*os.File, r Remote, o Options,
) (*Device, error) {
	if err := doc.checkKeptRemote(len(files)); err != nil {
		return nil, err
	}
	lease, err := m.leaseAgain(doc, o)
	if err != nil {
		return nil, err
	}
	begun := false
	giveBack := func() error { return m.giveBack(lease, begun) }
	s := doc.existing()
	if s.links, err = doc.links(files); err != nil {
		return nil, errors.Join(err, giveBack())
	}
	found, err := kept(s.links)
	if err != nil {
		closeLinks(s.links)
		return nil, errors.Join(fmt.Errorf("blockdev: %s: %w", nbdnl.Path(doc.Index), err), giveBack())
	}
	d, err := m.goOn(ctx, s, m.watching(r), o, func(d *Device) error {
		d.lease, d.recovered, begun = lease, found, true
		d.conns.replacedBefore(doc.Replaced)
		if found.replaced > 0 || doc.Unseen {
			d.unseen = newUnseen(d)
		}
		return nil
	}, giveBack)
	if err != nil {
		closeLinks(s.links)
		return nil, err
	}
	return d, nil
}

// kept counts which of the connections of another server are alive.
func kept(links []link) (r recovery, err error) {
	for i, l := range links {
		dead := l.socket == nil
		if !dead {
			if dead, err = hungUp(l.socket); err != nil {
				return r, fmt.Errorf("connection %d: %w", i, err)
			}
		}
		if dead {
			r.replaced++
		} else {
			r.kept++
		}
	}
	return r, nil
}

// existing is what the document says of the device, but for its links.
func (doc *Document) existing() existing {
	return existing{
		index: doc.Index, incarnation: doc.Incarnation, identifier: doc.Identifier, size: doc.Size,
		blockSize: doc.BlockSize, flags: doc.Flags, timeout: doc.Timeout, deadTimeout: doc.DeadTimeout,
	}
}

// checkKeptRemote says what is wrong with a document of a device of ConnectRemote that came with
// that many files.
func (doc *Document) checkKeptRemote(files int) error {
	if err := doc.checkKeptVersion(); err != nil {
		return err
	}
	if err := doc.isFor(true); err != nil {
		return err
	}
	if err := doc.checkConnections(); err != nil {
		return err
	}
	if need := doc.alive(); files != need {
		return fmt.Errorf("blockdev: %s came with %d descriptors, and has %d", nbdnl.Path(doc.Index), files, need)
	}
	return nil
}

// AttachRemote is Attach for a device of ConnectRemote, of which the process that has watched over
// it is dead: connections that are lost are replaced again, by r. The others go on, of which
// nothing is seen here (RecoverRemote); to find them, a connection to the server is made for each,
// and ended. AttachRemote does not wait for any of that.
//
// Options hold as for ConnectRemote, but for Identifier, BlockSize and ReadOnly, which are as the
// device is. Its timeouts become those of the options. Connections is how many the device was made
// with; 0: as many as the kernel has queues for it. Nobody else may watch over the device.
func AttachRemote(ctx context.Context, left nbdnl.Status, r Remote, o Options) (*Device, error) {
	return machine{}.attachRemote(ctx, left, r, o)
}

func (m machine) attachRemote(ctx context.Context, left nbdnl.Status, r Remote, o Options) (*Device, error) {
	if !left.HasIdentifier {
		return nil, noIdentifier(left.Index)
	}
	s := m.existing(left, o)
	if len(s.links) > 1 {
		s.flags |= nbdnl.FlagCanMultiConn
	}
	return m.goOn(ctx, s, m.watching(r), o, func(d *Device) error {
		d.unseen = newUnseen(d)
		u := nbdnl.Update{Timeout: &s.timeout, DeadConnTimeout: &s.deadTimeout}
		return d.client.Reconfigure(ctx, left.Index, left.Identifier, u)
	}, func() error { return nil })
}

// existing is the device of which the kernel shows left, with options that are not complete yet.
// Its links are all dead.
func (m machine) existing(left nbdnl.Status, o Options) existing {
	if o.Connections == 0 {
		o.Connections = max(m.queues(left.Index), 1)
	}
	o = o.complete(0)
	s := existing{
		index: left.Index, identifier: left.Identifier, size: left.Size, blockSize: left.BlockSize,
		// It may show from a former use of the index.
		flags:   left.Flags&^nbdnl.FlagSendWriteZeroes | nbdnl.Flags(wire.FlagHasFlags),
		timeout: o.Timeout, deadTimeout: o.DeadTimeout, links: make([]link, o.Connections),
	}
	if left.ReadOnly {
		s.flags |= nbdnl.FlagReadOnly
	}
	return s
}

func noIdentifier(index int) error {
	return fmt.Errorf("blockdev: %s shows no identifier, and may be anybody's: %w",
		nbdnl.Path(index), errors.ErrUnsupported)
}
