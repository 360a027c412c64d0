package blockdev

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	nbdmachine "github.com/nbdctl/nbdctl/nbdnl/machine"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// A machine is where the devices are. The zero value is the running one; tests stand in front of
// another.
type machine struct {
	// first opens the device node of that number ("43:96") and reads n bytes from its beginning;
	// nil does so.
	first func(ctx context.Context, path, number string, n int) error
	// system tells who holds a device, and opens it. Its Root holds sys and proc.
	system nbdnl.System
}

// The settings of a device's queue and of its connections that are made here. Others were tried
// (make bench CASES='^tuning/': one connection to memory, in User-Mode Linux 6.1, medians of
// ratios) and left as they are: nr_requests of 32 or 128, and the scheduler "none", make no
// difference to 4 KiB, but "none" makes writes of 128 KiB slower by a fifth.
const (
	// maxSectorsKB bounds the requests that the kernel sends, in KiB. Each index keeps the setting
	// of its last user, so it is always made. Reads of 4 MiB are 1.28 times as fast as with 512 and
	// 1.35 times as with 128, writes 1.1 and 1.8 times; with 4096 writes would be 1.2 times as
	// fast, and take four times the memory: 128 of them may be in flight on each connection.
	maxSectorsKB = 1024

	// ampleSendBuffer, in bytes, is that of the kernel's end of a connection: writes of 128 KiB are
	// 1.2 times as fast as with the 208 KiB that a socket has otherwise, and with 64 KiB 0.75
	// times. More makes no difference, nor does it to anything smaller.
	ampleSendBuffer = 1 << 20

	// bigSendBuffer holds what the kernel sends ahead.
	bigSendBuffer = 8 << 20
)

// breaksSends reports whether this kernel loses a connection when a signal, which the Go runtime
// sends all the time, arrives at a thread that is in the middle of sending a request: seen with
// 6.12, not with 6.1 (which sends from a kernel thread), fixed in 7.2 (nbd_pending_cmd_work).
// Nothing shows it but the version. It was not seen with a send buffer so large that sends do not
// block, nor without a scheduler.
func (m machine) breaksSends() bool {
	if m.system.Root != "" {
		return breaksSends(m.root().Release())
	}
	return ourBreaksSends()
}

// ourBreaksSends is of the running kernel, which does not change.
var ourBreaksSends = sync.OnceValue(func() bool { return breaksSends(machine{}.root().Release()) })

func breaksSends(r nbdmachine.Release) bool { return !r.Before(6, 2, 0) && r.Before(7, 2, 0) }

// sendBuffer returns the size in bytes that the kernel's ends of the connections should have for
// their send buffers.
func (m machine) sendBuffer() int {
	if m.breaksSends() {
		return bigSendBuffer
	}
	return ampleSendBuffer
}

// tune makes the settings of the device's queue. What fails is logged, for the device works
// without, unless requests could come that are longer than the backend takes (maximum, in bytes; 0:
// no limit).
func (m machine) tune(index, maximum int, log *slog.Logger) error {
	if m.breaksSends() {
		m.set(index, "scheduler", "none", "[none]", log)
	}
	kb := maxSectorsKB
	if maximum > 0 {
		kb = min(kb, maximum>>10)
	}
	if now, err := m.number(index, "max_sectors_kb"); err == nil && now == kb {
		return nil
	}
	if hardware, err := m.number(index, "max_hw_sectors_kb"); err == nil {
		kb = min(kb, hardware)
	}
	m.set(index, "max_sectors_kb", strconv.Itoa(kb), strconv.Itoa(kb), log)
	if maximum == 0 {
		return nil
	}
	if now, err := m.number(index, "max_sectors_kb"); err != nil || now > maximum>>10 {
		return fmt.Errorf("blockdev: %s: the kernel's requests can't be limited to the %d bytes that the backend takes",
			nbdnl.Path(index), maximum)
	}
	return nil
}

// set writes a setting of the device's queue, unless it shows already. The kernel stops the queue
// for each write, even of what was there before (queue_attr_store), which takes longer than the
// whole connect.
func (m machine) set(index int, setting, value, shows string, log *slog.Logger) {
	now, err := os.ReadFile(m.queue(index, setting))
	if err == nil && slices.Contains(strings.Fields(string(now)), shows) {
		return
	}
	if err := os.WriteFile(m.queue(index, setting), []byte(value), 0o644); err != nil {
		log.Warn("setting of the device's queue was not made", "device", nbdnl.Path(index), "value", value, "err", err)
	}
}

// number reads a setting of the device's queue.
func (m machine) number(index int, setting string) (int, error) {
	b, err := os.ReadFile(m.queue(index, setting))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// same reports whether the device of that index is still the one of that incarnation.
func (m machine) same(index int, incarnation nbdnl.Incarnation) bool {
	return incarnation != 0 && m.system.IncarnationOf(index) == incarnation
}

// use opens the device and reads its first block.
func (m machine) use(ctx context.Context, index, blockSize int) error {
	number, err := os.ReadFile(m.path("sys/block", filepath.Base(nbdnl.Path(index)), "dev"))
	if err != nil {
		return err
	}
	first := m.first
	if first == nil {
		first = readFirst
	}
	return first(ctx, nbdnl.Path(index), strings.TrimSpace(string(number)), blockSize)
}

// node waits for the device node to be there.
func (m machine) node(ctx context.Context, index int) error {
	if m.first != nil {
		return nil // On that machine it is not looked at.
	}
	return awaitNode(ctx, func() error {
		_, err := os.Stat(nbdnl.Path(index))
		return err
	})
}

// deviceNumber returns the number ("43:96") of the block device that a path leads to, and false for
// anything else.
func (m machine) deviceNumber(path string) (string, bool) {
	if m.system.DeviceNumber != nil {
		return m.system.DeviceNumber(m.path(path))
	}
	return nbdmachine.DeviceNumber(path)
}

// open opens a device node.
func (m machine) open(path string, flag int) (nbdnl.Device, error) {
	if m.system.Open != nil {
		return m.system.Open(path, flag)
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err // and no Device that holds a nil pointer
	}
	return f, nil
}

func (m machine) queue(index int, setting string) string {
	return m.path("sys/block", filepath.Base(nbdnl.Path(index)), "queue", setting)
}

func (m machine) path(elem ...string) string { return m.root().Path(elem...) }

// root is where the machine's files are.
func (m machine) root() nbdmachine.Root { return nbdmachine.Root(m.system.Root) }
