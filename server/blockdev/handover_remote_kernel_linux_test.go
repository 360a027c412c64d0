package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A farServer has one export. It can be ended and started again.
type farServer struct {
	export  *server.Export
	address string
	srv     *server.Server
	served  chan error
}

// newFarServer has one start that offers so many bytes.
func newFarServer(t *testing.T, size int64) (*farServer, *memory.Memory) {
	t.Helper()
	disk, err := memory.New(size, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f := new(farServer)
	if f.export, err = server.NewExport(disk, server.Options{}); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	return f, disk
}

// load has 16 MiB of a device written and verified. goesOn waits until some of that has reached the
// server.
func (f *farServer) load(t *testing.T, d *blockdev.Device) (load *fio, goesOn func(round int)) {
	t.Helper()
	load = startFio(t, "--filename="+d.Path(), "--size=8m", "--numjobs=2", "--offset_increment=8m", "--rw=randwrite",
		"--bsrange=4k-64k", "--fsync=64")
	return load, func(round int) {
		t.Helper()
		requests := func() uint64 { s := f.export.Stats(); return s.Total().Requests }
		for before := requests(); requests() < before+200; {
			load.moment(t, "round", round)
		}
	}
}

// start has clients come to the address, or to a free one if there is none.
func (f *farServer) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", f.address)
	if err != nil {
		t.Fatal(err)
	}
	f.address, f.served = l.Addr().String(), make(chan error, 1)
	f.srv = &server.Server{Exports: map[string]*server.Export{"": f.export}}
	go func(s *server.Server) { f.served <- s.Serve(l) }(f.srv)
}

// stop cuts its connections.
func (f *farServer) stop(t *testing.T) {
	t.Helper()
	if err := f.srv.Close(); err != nil {
		t.Error(err)
	}
	if err := <-f.served; !errors.Is(err, server.ErrServerClosed) {
		t.Error(err)
	}
}

// dial returns the export as somebody has it who makes a device of it.
func (f *farServer) dial(ctx context.Context, connections int) (*nbd.Direct, error) {
	return nbd.DialDirect(ctx, "nbd://"+f.address+"/", nbd.Options{Connections: connections})
}

// TestKernelHandOverRemote hands a device whose kernel speaks with another server from one Device
// to the next, as if they were processes, while fio writes and verifies; every third successor
// refuses it. The server is ended and started again now and then, which whoever has the device then
// sees to.
func TestKernelHandOverRemote(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for _, connections := range []int{1, 2} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) { testHandOverRemote(t, connections) })
	}
}

func testHandOverRemote(t *testing.T, connections int) {
	const size, rounds = 16 << 20, 12
	f, disk := newFarServer(t, size)
	export, err := f.dial(t.Context(), connections)
	if err != nil {
		t.Fatal(err)
	}
	d, err := blockdev.ConnectRemote(t.Context(), export, blockdev.Options{
		Connections: connections, Timeout: 5 * time.Second, DeadTimeout: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { d.Close() }()
	load, goesOn := f.load(t, d)
	restarts := int64(0)
	var took []time.Duration
	for round := range rounds {
		goesOn(round)
		refuse := round%3 == 2
		start := time.Now()
		next, dialled, err := handOverRemote(t, d, f, refuse)
		took = append(took, time.Since(start))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if !refuse {
			if err := errors.Join(d.Close(), export.Close()); err != nil || d.Err() != blockdev.ErrHandedOver {
				t.Errorf("round %d: the old one: %v, %v", round, err, d.Err())
			}
			d, export = next, dialled
		}
		if round%4 == 1 { // once after a refusal, too
			f.stop(t)
			f.start(t)
			restarts++
		}
		awaitConnections(t, d, restarts*int64(connections), round)
	}
	goesOn(rounds)
	load.stop(t)
	if o := d.Outage(); o.Replaced != restarts*int64(connections) || d.Loss() != nil {
		t.Errorf("after %d restarts: %+v, a loss: %v", restarts, o, d.Loss())
	}

	p := bytes.Repeat([]byte("every byte"), 1<<20/10)
	dev := open(t, d, os.O_RDWR)
	if _, err := dev.WriteAt(p, 1<<20); err != nil {
		t.Error(err)
	}
	dev.Close()
	if err := errors.Join(d.Disconnect(t.Context()), export.Close()); err != nil {
		t.Error(err)
	}
	f.stop(t)
	got := make([]byte, len(p))
	if _, err := disk.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, p) {
		t.Errorf("what was written last is not there: %v", err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
	slices.Sort(took)
	t.Logf("a handover took %v (median), at most %v", took[rounds/2], took[rounds-1])
}

// handOverRemote hands a device over, and returns what has become of it, with its export; nil if it
// was refused, as it was to be.
func handOverRemote(t *testing.T, d *blockdev.Device, f *farServer, refuse bool) (
	next *blockdev.Device, export *nbd.Direct, err error,
) {
	t.Helper()
	refused := errors.New("not now")
	open := func(ctx context.Context, doc *blockdev.Document, _ []*os.File) (_ blockdev.Remote, err error) {
		if refuse {
			return nil, refused
		}
		export, err = f.dial(ctx, len(doc.Connections))
		return export, err
	}
	never := func(context.Context, *blockdev.Document, []*os.File) (backends.Backend, error) {
		return nil, errors.New("it has no backend")
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	theirs, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	ours, err := l.Accept()
	if err != nil {
		return nil, nil, err
	}
	defer ours.Close()
	taken := make(chan error, 1)
	go func() {
		var err error
		next, err = blockdev.TakeOverEither(t.Context(), theirs.(*net.UnixConn), never, open, blockdev.Options{})
		taken <- err
	}()
	err = d.HandOverTo(t.Context(), ours.(*net.UnixConn), blockdev.HandOverOptions{})
	took := <-taken
	if refuse {
		if err == nil || !errors.Is(took, refused) {
			return nil, nil, errors.Join(errors.New("it was not refused"), err, took)
		}
		return nil, nil, nil
	}
	return next, export, errors.Join(err, took)
}
