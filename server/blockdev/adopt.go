package blockdev

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// An existing device is one that the kernel has connected already, with all that who goes on with
// it must know.
type existing struct {
	index       int
	incarnation nbdnl.Incarnation // 0: not known
	identifier  string
	size        int64       // in bytes
	blockSize   int         // in bytes
	flags       nbdnl.Flags // that the kernel was told
	timeout     time.Duration
	deadTimeout time.Duration
	links       []link // in the order in which the kernel knows them
}

// A maker makes the Device of one that the kernel has connected already.
type maker struct {
	remote bool // the kernel speaks with another server
	device func(Options) (*Device, error)
}

// serving makes Devices that are served with b.
func (m machine) serving(b backends.Backend) maker {
	return maker{false, func(o Options) (*Device, error) { return m.newDevice(b, o) }}
}

// adopt makes a Device of one that the kernel has connected already, and serves it with b. Of the
// options it heeds Client, MaxInFlight, Recoverable and Logger; the others are as the device is.
// The device is not opened.
//
// If the kernel's device or the backend is not what it has to be, the errors are *MismatchErrors,
// one for each difference. The device stays as it is then: nothing was read from its links, which
// the caller still owns, and what is asked of it waits. So it does if begin fails, which is called
// when all is well, and has the device not served yet. After success the links are the Device's.
// adopt calls giveBack once: when the device has ended, or was not adopted.
func (m machine) adopt(
	ctx context.Context, s existing, b backends.Backend, o Options, begin func(*Device) error, giveBack func() error,
) (*Device, error) {
	return m.goOn(ctx, s, m.serving(b), o, begin, giveBack)
}

// goOn is adopt, with what makes the Device. After an error links that were to be watched are
// closed, and their connections as they were.
func (m machine) goOn(
	ctx context.Context, s existing, with maker, o Options, begin func(*Device) error, giveBack func() error,
) (*Device, error) {
	o.BlockSize, o.Connections, o.Identifier = s.blockSize, len(s.links), s.identifier
	o.Timeout, o.DeadTimeout, o.ReadOnly = s.timeout, s.deadTimeout, s.flags&nbdnl.FlagReadOnly != 0
	if len(s.links) == 0 {
		return nil, errors.Join(fmt.Errorf("blockdev: %s has no connections to adopt", nbdnl.Path(s.index)), giveBack())
	}
	d, err := with.device(o)
	if err != nil {
		return nil, errors.Join(err, giveBack())
	}
	d.giveBack = giveBack
	incarnation := m.system.IncarnationOf(s.index)
	st, err := d.client.Status(ctx, s.index)
	if err == nil {
		c := comparison{index: s.index}
		c.kernel(s, st, incarnation)
		c.counterpart(s, d, m) // before the flags are those of the device
		err = errors.Join(c.errs...)
	}
	d.flags, d.index = s.flags, s.index
	var conns []transmitter
	if err == nil {
		conns, err = d.transmitters(s.links)
	}
	if err == nil {
		err = d.client.Inherit(s.index, s.identifier, incarnation, s.timeout)
	}
	if err == nil && begin != nil {
		err = begin(d)
	}
	if err != nil {
		letGo(conns)
		for _, c := range conns {
			if c, ok := c.(served); ok {
				c.entry.end() // It was not begun, and the link is as it was.
			}
		}
		d.conns.retire()
		return nil, errors.Join(err, d.release())
	}
	d.isAt(s.index, incarnation)
	d.conns.serve(conns)
	return d, nil
}

// A comparison collects differences.
type comparison struct {
	index int
	errs  []error
}

func (c *comparison) equal(setting string, want, got any) {
	if want != got {
		c.errs = append(c.errs, &MismatchError{c.index, setting, fmt.Sprint(want), fmt.Sprint(got)})
	}
}

// kernel compares with what the kernel shows. A kernel without identifiers knows the device by its
// incarnation only.
func (c *comparison) kernel(s existing, st nbdnl.Status, incarnation nbdnl.Incarnation) {
	c.equal("state", nbdnl.StateLive, st.State)
	switch {
	case st.State != nbdnl.StateLive:
		return
	case st.Mode == nbdnl.ModeIoctl:
		c.equal("mode", nbdnl.ModeNetlink, st.Mode) // It ends with the process that has connected it.
	case st.HasIdentifier:
		c.equal("identifier", s.identifier, st.Identifier)
	case s.incarnation == 0:
		c.equal("incarnation", incarnation, s.incarnation)
	}
	if s.incarnation != 0 {
		c.equal("incarnation", s.incarnation, incarnation)
	}
	c.equal("size", s.size, st.Size)
	c.equal("block size", s.blockSize, st.BlockSize)
	// Zeroes may show from a former use of the index.
	for _, name := range beyond(s.flags|nbdnl.FlagSendWriteZeroes, st.Flags) {
		c.equal(name, false, true)
	}
	if s.flags&nbdnl.FlagReadOnly != 0 {
		c.equal("read-only", true, st.ReadOnly)
	}
}

// counterpart compares with what the backend is and can do, once it is offered by d, or the export
// of another server.
func (c *comparison) counterpart(s existing, d *Device, m machine) {
	kind := "backend "
	if d.export == nil {
		kind = "export "
		if len(s.links) > 1 {
			c.equal(kind+"multi-conn", true, d.flags&nbdnl.FlagCanMultiConn != 0)
		}
	}
	c.equal(kind+"size", s.size, d.Size())
	for _, name := range beyond(d.flags, s.flags) {
		c.equal(kind+name, true, false)
	}
	if s.flags&nbdnl.FlagReadOnly == 0 {
		c.equal(kind+"read-only", false, d.ReadOnly())
	}
	// The kernel stops the queue to change this, which waits for the requests that nobody serves
	// yet.
	if maximum := d.backend.BlockSizes.Maximum; maximum > 0 {
		if kb, err := m.number(s.index, "max_sectors_kb"); err != nil || kb > maximum>>10 {
			c.equal("max_sectors_kb", fmt.Sprintf("at most %d", maximum>>10), kb)
		}
	}
}

// beyond returns the names of the abilities that are used and may not be. That fewer are used harms
// nothing: whoever administers a machine can turn the cache of a disk off.
func beyond(may, used nbdnl.Flags) (names []string) {
	for _, ability := range []struct {
		flag nbdnl.Flags
		name string
	}{
		{nbdnl.FlagSendFlush, "flush"},
		{nbdnl.FlagSendFUA, "fua"},
		{nbdnl.FlagSendTrim, "trim"},
		{nbdnl.FlagSendWriteZeroes, "zeroes"},
	} {
		if used&^may&ability.flag != 0 {
			names = append(names, ability.name)
		}
	}
	return names
}
