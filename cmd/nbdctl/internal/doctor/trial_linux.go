package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A trial is how the first device fared, made as nbdctl connect would make it.
type trial struct {
	name string
	// opens is how often other processes have opened it, by their names.
	opens map[string]int
	// unwatched is why that could not be seen.
	unwatched error
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
	switch code {
	case exit.Busy:
		// Which connect does not meet as long as it may take any device.
		return warning("a device for trial was kept busy: %s", oneLine(err)).
			do("make who opens devices leave them alone (held, openers)")
	case exit.NotFound:
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
	dev, _, err := b.connect(ctx, d, 1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.disconnect(dev)) }()
	t := &trial{name: filepath.Base(dev.Path())}
	watch, watchErr := watchOpens(dev.Path())
	err = d.exercise(dev.Path())
	if t.unwatched = watchErr; watchErr != nil {
		return t, err
	}
	// What udev and its like do when a device changes, they do now, unless /sys
	// is read-only, as in a container.
	_ = os.WriteFile(filepath.Join("/sys/block", t.name, "uevent"), []byte("change"), 0o200)
	b.settle(ctx) // udev may be slow; of others nobody knows when they are done
	opens, stopErr := watch.stop(openPatience)
	t.opens = opens
	return t, errors.Join(err, stopErr)
}

// openPatience is how long those who open devices that change are waited for.
const openPatience = 300 * time.Millisecond

// connect makes b's device of a backend, and tells how long that took.
func (b *bench) connect(ctx context.Context, d *disk, connections int) (*blockdev.Device, time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, connectPatience, fmt.Errorf("not within %s", connectPatience))
	defer cancel()
	for {
		b.settle(ctx)
		begin := time.Now()
		dev, err := blockdev.ConnectIndex(ctx, b.index, d, blockdev.Options{
			Client:      b.client,
			Connections: connections,
			Timeout:     deviceTimeout,
			Identifier:  nbdnl.NewIdentifier(host.IdentifierPrefix),
		})
		if err == nil || !b.evade(ctx, err) {
			return dev, time.Since(begin), err
		}
	}
}

// disconnect ends a device, whoever uses it: nothing is lost.
func (b *bench) disconnect(dev *blockdev.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	b.settle(ctx)
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
	return readBack(path, at, want)
}

// readBack compares what should be at that offset with what the device itself
// has, past the cache in which the write has left it. Offset and length have to
// be multiples of the device's blocks.
func readBack(path string, at int64, want []byte) (err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// open(2): O_DIRECT may ask for aligned memory, which a mapping is.
	got, err := unix.Mmap(-1, 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(got)) }()
	if _, err := f.ReadAt(got, at); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("what was written to %s is not what is read from it", path)
	}
	return nil
}

// openers tells who opens devices that are none of their business.
func (m *Machine) openers(ctx context.Context) []Finding {
	if _, needs := m.openBench(ctx); needs != "" {
		return []Finding{unknown(needs)}
	}
	t := m.trial
	switch {
	case t == nil:
		return []Finding{unknown("a device that works")}
	case t.unwatched != nil:
		return []Finding{unknown("a kernel from 5.13 on, which tells who opens devices: " + t.unwatched.Error())}
	case len(t.opens) == 0:
		return []Finding{ok("nobody opened %s when it was written and changed", t.name)}
	}
	return []Finding{openersOf(t)}
}

// openersOf is the finding about those who have opened a device.
func openersOf(t *trial) Finding {
	var who []string
	others := false
	for _, name := range slices.Sorted(maps.Keys(t.opens)) {
		others = others || !isUdev(name)
		if n := t.opens[name]; n > 1 {
			name += fmt.Sprintf(" %d times", n)
		}
		who = append(who, name)
	}
	seen := fmt.Sprintf("%s was opened when it was written and changed, by %s", t.name, few(who))
	if !others {
		return ok("%s, for whom nbdctl waits", seen)
	}
	return warning("%s", seen).
		because("a device that is open can't be connected anew, and stays after a disconnect; " +
			"nbdctl waits for some seconds until it is let go").
		do("make these processes leave nbd devices alone, or let go of them at once")
}

// isUdev tells whether a process, by its name and pid, is one of udev's.
func isUdev(process string) bool {
	name, _, _ := strings.Cut(process, " ")
	return name == "(udev-worker)" || name == "systemd-udevd" || name == "udevd"
}
