package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A trial is the life of the first device, as nbdctl connect would make it.
type trial struct {
	name      string
	connected time.Duration
	// opens is how often others have opened it after it was written, and openers
	// are those of them that were still there to be seen.
	opens   int
	openers []string
}

// A disk is memory that counts what makes it durable.
type disk struct {
	memory *memory.Memory
	syncs  atomic.Int64
}

func (d *disk) Size() int64                              { return d.memory.Size() }
func (d *disk) ReadAt(p []byte, off int64) (int, error)  { return d.memory.ReadAt(p, off) }
func (d *disk) WriteAt(p []byte, off int64) (int, error) { return d.memory.WriteAt(p, off) }

// Sync has nothing to write.
func (d *disk) Sync() error {
	d.syncs.Add(1)
	return nil
}

// device makes a device, writes to it, and looks whether that arrived.
func (m *Machine) device(ctx context.Context) []Finding {
	b, needs := m.openBench(ctx)
	if needs != "" {
		return []Finding{unknown(needs)}
	}
	t, err := b.try(ctx)
	if err != nil {
		return []Finding{m.failed(err)}
	}
	m.trial = t
	return []Finding{ok("%s was connected, written, flushed, read back and disconnected", t.name)}
}

// failed is the finding about a device that could not be made or did not work.
func (m *Machine) failed(err error) Finding {
	code := exit.Of(err)
	if code == exit.Busy || code == exit.NotFound {
		code = exit.Failure
	}
	return problem(code, "a device for trial did not work: %s", oneLine(err)).
		because("nbdctl connect will fare no better").
		do("dmesg | grep nbd, which has the kernel's reason")
}

// try makes the first device and ends it.
func (b *bench) try(ctx context.Context) (_ *trial, err error) {
	store, err := memory.New(deviceSize, memory.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	d := &disk{memory: store}
	dev, took, err := b.connect(ctx, d, 1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.disconnect(dev)) }()
	t := &trial{name: filepath.Base(dev.Path()), connected: took}
	watch, err := watchOpens(dev.Path(), func() { t.look(dev.Index()) })
	if err != nil {
		return nil, err
	}
	err = d.exercise(dev.Path())
	if err == nil {
		// What udev and its like do when a device changes, they do now.
		err = os.WriteFile(filepath.Join("/sys/block", t.name, "uevent"), []byte("change"), 0o200)
	}
	t.opens, err = watch.stop(openPatience, err)
	t.opens-- // our own
	return t, err
}

// openPatience is how long those who open devices that change are waited for.
const openPatience = 300 * time.Millisecond

// connect makes b's device of a backend, and tells how long that took.
func (b *bench) connect(ctx context.Context, d *disk, connections int) (*blockdev.Device, time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lifePatience, fmt.Errorf("not within %s", lifePatience))
	defer cancel()
	begin := time.Now()
	dev, err := blockdev.ConnectIndex(ctx, b.index, d, blockdev.Options{
		Client: b.client, Connections: connections, Timeout: deviceTimeout, Identifier: nbdnl.NewIdentifier(host.IdentifierPrefix),
	})
	return dev, time.Since(begin), err
}

// disconnect ends a device, whoever uses it: nothing is lost.
func (b *bench) disconnect(dev *blockdev.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	err := dev.Disconnect(ctx)
	if errors.Is(err, nbdnl.ErrBusy) {
		err = dev.Close()
	}
	return err
}

// exercise writes to the device at path, once, and looks at what has arrived.
func (d *disk) exercise(path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	want := bytes.Repeat([]byte("nbdctl doctor. "), 1<<12)
	const at = deviceSize / 2
	if _, err := f.WriteAt(want, at); err != nil {
		return err
	}
	before := d.syncs.Load()
	if err := f.Sync(); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := d.memory.ReadAt(got, at); err != nil {
		return err
	}
	switch {
	case !bytes.Equal(got, want):
		return fmt.Errorf("what was written to %s and synced did not reach its server", path)
	case d.syncs.Load() == before:
		return fmt.Errorf("a sync of %s brought no flush to its server", path)
	}
	return nil
}

// look notes who has the device open at this moment.
func (t *trial) look(index int) {
	holders, err := nbdnl.Holders(index)
	if err != nil {
		return // the device is going, and they with it
	}
	for _, h := range holders {
		who := fmt.Sprintf("process %d (%s)", h.PID, h.Comm)
		if h.Kind != nbdnl.HolderProcess {
			who = h.String()
		}
		if h.PID != os.Getpid() && !slices.Contains(t.openers, who) {
			t.openers = append(t.openers, who)
		}
	}
}

// openers tells who opens devices that are none of their business.
func (m *Machine) openers(ctx context.Context) []Finding {
	if _, needs := m.openBench(ctx); needs != "" {
		return []Finding{unknown(needs)}
	}
	t := m.trial
	if t == nil {
		return []Finding{unknown("a device that works")}
	}
	const why = "a device that is open can't be connected anew, and stays after a disconnect; nbdctl waits some seconds for who has it open"
	times := fmt.Sprintf("%d times", t.opens)
	if t.opens == 1 {
		times = "once"
	}
	switch {
	case t.opens <= 0 && t.openers == nil:
		return []Finding{ok("nobody opened %s when it changed", t.name)}
	case t.openers == nil:
		return []Finding{warning("somebody opened %s %s when it changed, too briefly to be seen", t.name, times).because(why).
			do("find who it is: fatrace, or bpftrace -e 'tracepoint:syscalls:sys_enter_openat { printf(\"%%s %%s\\n\", comm, str(args->filename)); }'")}
	}
	return []Finding{warning("%s opened %s when it changed (%s)", strings.Join(t.openers, ", "), t.name, times).because(why).
		do("if it is udev: see there; otherwise make it leave nbd devices alone")}
}
