package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
)

const (
	// deviceSize is that of the devices that are made, in bytes.
	deviceSize = 1 << 20
	// deviceTimeout is what the kernel has by itself: an index keeps that of its last user.
	deviceTimeout = 30 * time.Second
	// connectPatience bounds the making of one device, endPatience its end.
	connectPatience = 10 * time.Second
	endPatience     = 20 * time.Second
)

// A bench is the index on which devices are made to see how they do.
//
// An index keeps settings from one use to the next (from Linux 6.12 to 7.2 even
// what its server could do), and devices of doctor are to leave none. So where
// that is possible it is an index that did not exist before, and does not
// thereafter.
type bench struct {
	*spot
	// left are those before, which others have got.
	left    []*spot
	machine *Machine
	client  *nbdnl.Client
	// fresh is that each spot was made here.
	fresh bool
	// udev is that udev runs here, which looks at every device.
	udev bool
}

// openBench returns the index to make devices on, or what is needed to have one.
func (m *Machine) openBench(ctx context.Context) (*bench, string) {
	switch {
	case m.System.Root != "":
		return nil, "the running machine"
	case !m.privileged():
		return nil, "CAP_SYS_ADMIN"
	case m.silent != nil:
		return nil, m.silent.Error()
	case m.nodeless:
		return nil, "device nodes"
	case m.bench != nil:
		return m.bench, ""
	}
	c, err := m.System.NewClient()
	if err != nil {
		return nil, err.Error()
	}
	b := &bench{machine: m, client: c, udev: m.exists(udevControl)}
	// Linux 5.10 waits for the end of a device that is to go in a way that may
	// take all of generic netlink with it. By ioctls none can be made.
	b.fresh = !m.release().Before(6, 1, 0) && m.hasDevtmpfs() && !m.byIoctl
	if err = b.take(ctx); err != nil && b.fresh {
		b.fresh = false
		err = b.take(ctx)
	}
	if err != nil {
		_ = c.Close() // nothing was done with it
		return nil, oneLine(err)
	}
	m.bench = b
	return b, ""
}

// hasDevtmpfs tells whether nodes of new devices appear in /dev.
func (m *Machine) hasDevtmpfs() bool {
	found := false
	for line := range strings.Lines(m.read("proc/self/mountinfo")) {
		// proc_pid_mountinfo(5): the fifth is the mount point, after " - " comes the type.
		fields := strings.Fields(line)
		_, kind, _ := strings.Cut(line, " - ")
		if len(fields) > 4 && fields[4] == "/dev" {
			found = strings.HasPrefix(kind, "devtmpfs ") // the last one is on top
		}
	}
	return found
}

// nextIndex is the first one after all those that exist.
func (m *Machine) nextIndex() int {
	devices := m.devices()
	if len(devices) == 0 {
		return 0
	}
	last, _ := nbdnl.ParseIndex(devices[len(devices)-1]) // is one
	return last + 1
}

// queueSettings are those that connecting a device with nbdctl changes. On some
// kernels they stay changed after the disconnect.
var queueSettings = []string{"max_sectors_kb", "scheduler", "discard_max_bytes"}

func (m *Machine) readSettings(index int) map[string]string {
	settings := make(map[string]string)
	for _, name := range queueSettings {
		settings[name] = m.read(queue(index, name))
	}
	return settings
}

func queue(index int, setting string) string {
	return filepath.Join("sys/block", filepath.Base(nbdnl.Path(index)), "queue", setting)
}

// selected returns the scheduler in "mq-deadline [none]".
func selected(schedulers string) string {
	_, name, _ := strings.Cut(schedulers, "[")
	name, _, _ = strings.Cut(name, "]")
	return name
}

// Close ends what the checks have left open, and leaves the indexes that they
// have used as they were.
func (m *Machine) Close() error {
	b := m.bench
	if b == nil {
		return nil
	}
	m.bench = nil
	defer b.client.Close()
	defer m.removeState()
	var errs []error
	for _, s := range append(b.left, b.spot) {
		errs = append(errs, b.vacate(s))
	}
	return errors.Join(errs...)
}

// removeState removes the directories that claims and leases have made, if
// they were not there before and nobody else uses them by now.
func (m *Machine) removeState() {
	if m.newState != "" {
		_ = os.Remove(filepath.Join(m.newState, "claims")) // what is in use is not empty
		_ = os.Remove(filepath.Join(m.newState, "leases"))
		_ = os.Remove(m.newState)
	}
}

// cycle connects a device of memory, looks at it, and ends it. The device has
// as many Unix sockets as its flags allow.
func (b *bench) cycle(ctx context.Context, cfg nbdnl.Config, look func(nbdnl.Status)) (err error) {
	if cfg.BlockSize == 0 {
		cfg.BlockSize = host.DefaultBlockSize
	}
	n := 1
	if cfg.Flags&nbdnl.FlagCanMultiConn != 0 {
		n = 2
	}
	links, err := serveUnix(n, cfg.BlockSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, links.close()) }()
	cfg.Sockets = links.kernel
	return b.cycleOver(ctx, cfg, look, b.end)
}

// cycleOver is cycle with the sockets of cfg, and with a way of its own to end
// the device.
func (b *bench) cycleOver(
	ctx context.Context,
	cfg nbdnl.Config,
	look func(nbdnl.Status),
	end func(identifier string) error,
) (err error) {
	cfg = trialConfig(cfg)
	for {
		b.settle(ctx)
		err := b.claimed(ctx, b.index, func() error { return b.client.ConnectIndex(ctx, b.index, cfg) })
		if err == nil {
			break
		}
		if !b.evade(ctx, err) {
			return err
		}
	}
	if look != nil {
		var st nbdnl.Status
		if st, err = b.client.Status(ctx, b.index); err == nil {
			look(st)
		}
	}
	b.settle(ctx)
	return errors.Join(err, end(cfg.Identifier))
}

// trialConfig completes the configuration of a device.
func trialConfig(cfg nbdnl.Config) nbdnl.Config {
	if cfg.BlockSize == 0 {
		cfg.BlockSize = host.DefaultBlockSize
	}
	cfg.Size, cfg.Timeout = deviceSize, deviceTimeout
	cfg.Identifier = nbdnl.NewIdentifier(host.IdentifierPrefix)
	return cfg
}

// settle waits some time until udev has done with the device, and nobody has it
// open while it is idle. ConnectIndex would wait too, but each of its attempts
// costs a line in the kernel's log, and a device that is ended while udev reads
// from it costs many.
func (b *bench) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settlePatience)
	defer cancel()
	if b.udev {
		_ = exec.CommandContext(ctx, "udevadm", "settle").Run() // without, there are these lines
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := b.client.Status(ctx, b.index)
		if err != nil || st.State != nbdnl.StateHeld {
			return // what is wrong the connect says
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// settlePatience bounds that wait; ConnectIndex has some patience of its own.
const settlePatience = 3 * time.Second

// end disconnects the device when those who look at it have let go of it.
func (b *bench) end(identifier string) error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	err := b.client.Detach(ctx, b.index, nbdnl.DetachOptions{Identifier: identifier})
	if errors.Is(err, errors.ErrUnsupported) {
		// No identifiers here; it was connected a moment ago.
		err = b.client.Detach(ctx, b.index, nbdnl.DetachOptions{Any: true})
	}
	switch {
	case err == nil, errors.Is(err, nbdnl.ErrNotConnected), errors.Is(err, fs.ErrNotExist):
		return nil // a device that goes as a whole may look like that
	}
	return b.cut(identifier)
}

// cut disconnects the device, whoever uses it: there is nobody's data on it.
func (b *bench) cut(identifier string) error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	err := b.client.Drop(ctx, b.index, identifier)
	if errors.Is(err, errors.ErrUnsupported) {
		err = b.client.DropAny(ctx, b.index)
	}
	if err == nil {
		err = b.client.WaitFree(ctx, b.index)
	}
	if errors.Is(err, nbdnl.ErrNotConnected) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// gone waits until the index does not exist any more, of which the kernel tells
// nobody but udev.
func (b *bench) gone(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if !b.machine.exists("sys/block", b.name()) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", b.name(), context.Cause(ctx))
		}
	}
}

// name returns the name of the device.
func (s *spot) name() string { return filepath.Base(nbdnl.Path(s.index)) }
