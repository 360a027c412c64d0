package blockdev_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelHandOver hands a device in memory with four connections from one Device to the next, as
// if they were processes, while fio writes and verifies; every third successor refuses it. What a
// device has served is counted on.
func TestKernelHandOver(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size, rounds = 16 << 20, 18
	disk, err := memory.New(size, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := connect(t, disk, blockdev.Options{Connections: 4, Timeout: 20 * time.Second, DeadTimeout: time.Minute})
	load := startFio(t, "--filename="+d.Path(), "--size=8m", "--numjobs=2", "--offset_increment=8m", "--rw=randwrite",
		"--bsrange=4k-64k", "--fsync=64")
	requests := func(d *blockdev.Device) (n uint64) {
		for _, s := range d.Stats() {
			n += s.Total().Requests
		}
		return n
	}
	var took []time.Duration
	for round := range rounds {
		for before := requests(d); requests(d) < before+200; {
			load.moment(t, "round", round)
		}
		served := requests(d)
		start := time.Now()
		next, inherited, err := handOver(t, d, disk, round%3 == 2)
		took = append(took, time.Since(start))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if next == nil {
			continue // It was refused.
		}
		if err := errors.Join(disk.Leave(), d.Close()); err != nil {
			t.Errorf("round %d: the old one: %v", round, err)
		}
		d, disk = next, inherited
		if n := requests(d); n < served {
			t.Errorf("round %d: %d requests are counted, and were %d", round, n, served)
		}
	}
	load.stop(t)
	st := d.Export().Stats()
	if d.Outage().Replaced != 0 || st.Read.Errors+st.Write.Errors+st.Flush.Errors != 0 {
		t.Errorf("%d connections were replaced, the errors are %+v", d.Outage().Replaced, st)
	}
	if err := errors.Join(d.Disconnect(t.Context()), disk.Close()); err != nil {
		t.Error(err)
	}
	slices.Sort(took)
	t.Logf("a handover took %v (median), at most %v", took[rounds/2], took[rounds-1])
}

// handOver hands a device over with its memory, and returns what has become of both; nil if it was
// refused, as it was to be.
func handOver(t *testing.T, d *blockdev.Device, disk *memory.Memory, refuse bool) (
	next *blockdev.Device, inherited *memory.Memory, err error,
) {
	t.Helper()
	files, err := disk.Files()
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		defer f.Close()
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	refused := errors.New("not now")
	type result struct {
		d   *blockdev.Device
		err error
	}
	taken := make(chan result, 1)
	go func() {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			taken <- result{nil, err}
			return
		}
		defer c.Close()
		open := func(_ context.Context, doc *blockdev.Document, files []*os.File) (backends.Backend, error) {
			var err error
			if inherited, err = memory.Inherit(doc.Size, files, memory.Options{}); err == nil && refuse {
				err = errors.Join(refused, inherited.Leave())
			}
			return inherited, err
		}
		d, err := blockdev.TakeOver(t.Context(), c.(*net.UnixConn), open, blockdev.Options{})
		taken <- result{d, err}
	}()
	c, err := l.Accept()
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	err = d.HandOverTo(t.Context(), c.(*net.UnixConn), blockdev.HandOverOptions{Unsynced: true, Files: files})
	got := <-taken
	if refuse {
		if err == nil || !errors.Is(got.err, refused) {
			return nil, nil, errors.Join(errors.New("it was not refused"), err, got.err)
		}
		return nil, nil, nil
	}
	return got.d, inherited, errors.Join(err, got.err)
}
