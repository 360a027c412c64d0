package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelSwap swaps the backend of a device 20 times, to a copy that is made in the quiet
// moment, while fio writes and verifies. What is swapped out is spoilt at once. However slow the
// machine is, fio runs until the last of them.
func TestKernelSwap(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size, swaps = 16 << 20, 20
	now := newRecorder(size)
	d := connect(t, now, blockdev.Options{Connections: 2})
	load := startFio(t, "--filename="+d.Path(), "--size=16m", "--rw=randrw", "--bs=4k")
	var longest time.Duration
	// busy returns when fio has written, and read what it verifies, since it was called: at least
	// two of its backlogs.
	busy := func(i int) {
		t.Helper()
		before := d.Export().Stats()
		for {
			now := d.Export().Stats()
			if now.Write.Requests >= before.Write.Requests+128 && now.Read.Requests >= before.Read.Requests+64 {
				return
			}
			load.moment(t, "swap", i)
		}
	}
	for i := range swaps {
		busy(i) // so that there is something to swap under
		old := now
		start := time.Now()
		if err := d.SwapFunc(t.Context(), func(context.Context) (backends.Backend, error) {
			now = newRecorder(size)
			copy(now.data, old.data)
			return now, nil
		}); err != nil {
			t.Fatalf("swap %d: %v", i, err)
		}
		longest = max(longest, time.Since(start))
		for i := range old.data {
			old.data[i] = 0xff
		}
	}
	busy(swaps)
	load.stop(t)
	st := d.Export().Stats()
	t.Logf("%d reads, %d writes, the longest swap took %v", st.Read.Requests, st.Write.Requests, longest)
	if failed := st.Read.Errors + st.Write.Errors; failed > 0 {
		t.Errorf("%d requests failed", failed)
	}
}

// A fio writes to a device, and verifies what it has written, until it is stopped.
type fio struct {
	*exec.Cmd
	output   bytes.Buffer
	finished chan error
}

func startFio(t *testing.T, args ...string) *fio {
	t.Helper()
	f := &fio{finished: make(chan error, 1)}
	f.Cmd = exec.CommandContext(t.Context(), "fio", append([]string{
		"--name=load", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--randrepeat=0", "--thread",
		"--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--time_based", "--runtime=1h",
	}, args...)...)
	f.Stdout, f.Stderr = &f.output, &f.output
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { f.finished <- f.Wait() }()
	return f
}

// moment lets a moment go by, in which fio has not ended.
func (f *fio) moment(t *testing.T, what string, number int) {
	t.Helper()
	select {
	case err := <-f.finished:
		t.Fatalf("fio ended at %s %d: %v\n%s", what, number, err, &f.output)
	case <-time.After(time.Millisecond):
	}
}

// stop ends fio, of which no job has failed.
func (f *fio) stop(t *testing.T) {
	t.Helper()
	if err := f.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	// An interrupted fio ends with 128 and the number of its jobs that have failed.
	var ended *exec.ExitError
	if err := <-f.finished; !errors.As(err, &ended) || ended.ExitCode() != 128 {
		t.Errorf("fio: %v\n%s", err, &f.output)
	}
}

// TestKernelSwapPlain shows who gets what, what is refused, and that a backend that hangs is kept.
func TestKernelSwapPlain(t *testing.T) {
	nbdnltest.RequireKernel(t)
	old, next := newRecorder(1<<20), newRecorder(1<<20)
	d := connect(t, old, blockdev.Options{})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 4096)
	write := func(s string, off int64) {
		t.Helper()
		copy(p, s)
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	write("one", 0)
	syncs := old.syncs.Load()
	if err := d.Swap(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	if old.syncs.Load() == syncs {
		t.Error("what was written to the old backend is not durable")
	}
	write("two", 4096)
	if string(old.stored(0, 3)) != "one" || string(next.stored(4096, 3)) != "two" {
		t.Error("a write has gone to the wrong backend")
	}
	if bytes.HasPrefix(old.stored(4096, 4096), []byte("two")) {
		t.Error("a write has gone to both")
	}

	for _, b := range []backends.Backend{newRecorder(2 << 20), bytes.NewReader(make([]byte, 1<<20)), nil} {
		if err := d.Swap(t.Context(), b); err == nil {
			t.Errorf("swapped to %T", b)
		}
	}

	release := make(chan struct{})
	hang := func(op string, _ int64) error {
		if op == "write" {
			<-release
		}
		return nil
	}
	next.before.Store(&hang)
	written := make(chan error, 1)
	go func() {
		_, err := f.WriteAt(p, 8192)
		written <- err
	}()
	for d.Export().Stats().InFlight == 0 {
		<-time.After(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := d.Swap(ctx, old); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a request that hangs: %v", err)
	}
	close(release)
	if err := <-written; err != nil {
		t.Errorf("the request that hung: %v", err)
	}
	write("on", 12288)
	if string(next.stored(8192, 3)) != "two" || string(next.stored(12288, 2)) != "on" {
		t.Error("the device does not go on with the backend that it had")
	}
}
