package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"text/tabwriter"

	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A disk has nothing that takes memory: what is measured is the device's.
type disk struct{}

func (disk) Size() int64                             { return deviceSize }
func (disk) ReadAt(p []byte, off int64) (int, error) { clear(p); return len(p), nil }
func (disk) WriteAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (disk) Sync() error                             { return nil }

// measureIdle shows what devices cost that have done something and do nothing now, and how that
// grows with their number.
func measureIdle(ctx context.Context, to io.Writer) error {
	out := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "\nidle devices\tconnections\tresident KiB\tper device\tper connection\t"+
		"goroutines\tper device\theap and stacks KiB per device")
	for _, t := range []struct{ devices, connections int }{{1, 1}, {16, 1}, {64, 1}, {256, 1}, {64, 4}} {
		if err := idleDevices(ctx, out, t.devices, t.connections); err != nil {
			return err
		}
	}
	return out.Flush()
}

func idleDevices(ctx context.Context, out io.Writer, devices, connections int) (err error) {
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "idle"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	before, err := weigh()
	if err != nil {
		return err
	}
	for range devices {
		d, err := pool.Connect(ctx, disk{}, blockdev.Options{Connections: connections})
		if err != nil {
			return err
		}
		defer d.Close()
		if err := os.WriteFile(d.Path(), make([]byte, 1<<20), 0); err != nil { // which its last close writes
			return err
		}
	}
	after, err := weigh()
	if err != nil {
		return err
	}
	resident, memory := after.resident-before.resident, after.memory-before.memory
	goroutines := after.goroutines - before.goroutines
	per := func(total, n int) float64 { return float64(total) / float64(n) }
	fmt.Fprintf(out, "%d\t%d\t%d\t%.1f\t%.1f\t%d\t%.1f\t%.1f\n",
		devices, connections,
		resident, per(resident, devices), per(resident, devices*connections),
		goroutines, per(goroutines, devices),
		per(memory, devices),
	)
	return nil
}

// A weight is what the process has; memory, of its heap and stacks, and resident in KiB.
type weight struct{ resident, memory, goroutines int }

func weigh() (weight, error) {
	debug.FreeOSMemory()
	debug.FreeOSMemory() // Pools keep what they have for one collection.
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return weight{}, err
	}
	pages, err := strconv.Atoi(string(bytes.Fields(b)[1]))
	if err != nil {
		return weight{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return weight{pages * os.Getpagesize() >> 10, int(m.HeapInuse+m.StackInuse) >> 10, runtime.NumGoroutine()}, nil
}
