package blockdev_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
	"github.com/nbdctl/nbdctl/server/wire"
)

// full has writes fail with ENOSPC while the function that it returns has last said so.
func (r *recorder) full() func(bool) {
	var now atomic.Bool
	hook := func(op string, _ int64) error {
		if now.Load() && op == "write" {
			return syscall.ENOSPC
		}
		return nil
	}
	r.before.Store(&hook)
	return now.Store
}

// has reports whether a block of the backend begins with p. A copy of all would take half a minute
// with -race under QEMU.
func (r *recorder) has(p []byte) bool {
	const block, start = 4096, 16
	for off := int64(0); off < r.Size(); off += block {
		if bytes.HasPrefix(p, r.stored(off, start)) && bytes.Equal(p, r.stored(off, int64(len(p)))) {
			return true
		}
	}
	return false
}

// acknowledge says that the losses so far are known.
func acknowledge(t *testing.T, d *blockdev.Device) {
	t.Helper()
	var loss *blockdev.LossError
	if !errors.As(d.Loss(), &loss) || !d.Acknowledge(loss.Number) {
		t.Errorf("%v: it can't be acknowledged", d.Loss())
	}
}

// checkLoss fails the test unless err tells of writes that failed with ENOSPC.
func checkLoss(t *testing.T, when string, err error) {
	t.Helper()
	var loss *server.LossError
	// A file system on Linux 6.12 or later may write zeroes by a request of that kind.
	if !errors.As(err, &loss) || loss.Requests == 0 || !errors.Is(loss, syscall.ENOSPC) ||
		loss.First.Op != wire.CmdWrite && loss.First.Op != wire.CmdWriteZeroes {
		t.Errorf("%s: %v, want writes that failed with ENOSPC", when, err)
	}
}

// ended closes a device of which a loss is expected, or not.
func ended(t *testing.T, d *blockdev.Device) error {
	t.Helper()
	err := d.Close()
	checkFree(t, d.Index(), d.Identifier())
	return err
}

// TestKernelFlushBuffered loses a write of which somebody else is told: its owner is too, until it
// is acknowledged, and not of the next one that goes well.
func TestKernelFlushBuffered(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	full := b.full()
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	lose := func() {
		t.Helper()
		full(true)
		f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(bytes.Repeat([]byte("x"), 8192), 4096); err != nil {
			t.Fatalf("a write to the cache: %v", err)
		}
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("sync by somebody else: %v, want EIO", err)
		}
		f.Close()
		full(false)
	}
	lose()
	for range 2 {
		checkLoss(t, "Flush", d.Flush(t.Context()))
	}
	acknowledge(t, d)
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("Flush after that: %v", err)
	}
	if err := os.WriteFile(d.Path(), []byte("goes well"), 0); err != nil {
		t.Fatal(err)
	}
	syncs := b.syncs.Load()
	err = d.Flush(t.Context())
	if stored := b.stored(0, 9); err != nil || b.syncs.Load() == syncs || string(stored) != "goes well" {
		t.Errorf("error %v, %d syncs, the backend begins with %q", err, b.syncs.Load()-syncs, stored)
	}
	lose()
	checkLoss(t, "Close", ended(t, d))
	checkLoss(t, "second Close", d.Close())
}

// TestKernelFlushFileSystem loses the data of a file, whose file system is told and then unmounted,
// and writes those of another one that nobody has synced.
func TestKernelFlushFileSystem(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(32 << 20)
	full := b.full()
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs.ext4", "-q", "-O", "^has_journal", d.Path())
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatalf("mount: %v", err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("unmount: %v", err)
			}
		}
		mounted = false
	}
	defer unmount()

	content := bytes.Repeat([]byte("cached by a file system, "), 4000)
	if err := os.WriteFile(filepath.Join(dir, "kept"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	if b.has(content[:4096]) {
		t.Fatal("the file system keeps nothing back: there is nothing to show")
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if !b.has(content[:4096]) {
		t.Error("the backend has not got what the file system had cached")
	}

	full(true)
	if err := os.WriteFile(filepath.Join(dir, "lost"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync() // Tells nobody.
	full(false)
	unmount()
	checkLoss(t, "Flush", d.Flush(t.Context()))
	acknowledge(t, d)
	if err := ended(t, d); err != nil {
		t.Errorf("Close: %v, of what was acknowledged", err)
	}
}

// partitioned returns a disk with one partition, which begins at 1 MiB and has half of it.
func partitioned(size int) *recorder {
	b := newRecorder(size)
	entry := []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0} // of Linux, from sector 2048 on
	copy(b.data[446:], binary.LittleEndian.AppendUint32(entry, uint32(size/512/2)))
	copy(b.data[510:], []byte{0x55, 0xaa})
	return b
}

// TestKernelFlushPartition finds what is cached of a partition.
func TestKernelFlushPartition(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := partitioned(8 << 20)
	d := connect(t, b, blockdev.Options{})
	f, err := os.OpenFile(d.Path()+"p1", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("in a partition"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil || !bytes.HasPrefix(b.stored(1<<20, 20), []byte("in a partition")) {
		t.Errorf("error %v, the partition begins with %q", err, b.stored(1<<20, 20))
	}
}

// TestKernelFlushDead has a backend hang until the kernel gives it up: what was cached is lost, and
// Close says so.
func TestKernelFlushDead(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	release := make(chan struct{})
	hang := func(op string, _ int64) error {
		if op == "write" {
			<-release
		}
		return nil
	}
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	b.before.Store(&hang)
	if err := os.WriteFile(d.Path(), []byte("lost"), 0); err != nil {
		t.Fatal(err)
	}
	f := open(t, d, os.O_RDONLY)
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("sync by somebody else: %v, want EIO", err)
	}
	f.Close()
	close(release)
	<-d.Done()
	if err := ended(t, d); err == nil || !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want %v", err, d.Err())
	}
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("second Close: %v, want the same", err)
	}
}

// An absent backend has the goroutine of the connection wait in a read of the first block, until
// absence is closed.
type absent struct {
	*recorder
	absence atomic.Pointer[chan struct{}]
}

func (a *absent) ReadAtTo(w backends.Reply, off int64, n int) error {
	if until := a.absence.Load(); until != nil && off == 0 {
		<-*until
	}
	p := w.Buffer(n)
	if p == nil {
		return backends.ErrWouldBlock
	}
	_, err := a.ReadAt(p, off)
	return err
}

// WriteAtFrom takes nothing. That it is there keeps the server from going on without the goroutine,
// since a write could be in it.
func (a *absent) WriteAtFrom(backends.Payload, int64, int) error { return backends.ErrWouldBlock }

// stuckRead reads the first block of a device that has nothing else to do, and returns when the
// backend has the request.
func stuckRead(t *testing.T, d *blockdev.Device, f *os.File) <-chan error {
	t.Helper()
	read := make(chan error, 1)
	p := aligned(t, 4096)
	go func() {
		_, err := f.ReadAt(p, 0)
		read <- err
	}()
	for d.Export().Stats().InFlight == 0 {
		<-time.After(time.Millisecond)
	}
	return read
}

// TestKernelFlushUnseen has a backend keep the server from seeing that the kernel gives the
// connection up, and then what waits for another one, all of which is over when the server looks
// again: a write that was cached has failed for the kernel, and Flush says so.
func TestKernelFlushUnseen(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := &absent{recorder: newRecorder(1 << 20)}
	d := connect(t, b, blockdev.Options{Timeout: time.Second, DeadTimeout: time.Second})
	release := make(chan struct{})
	b.absence.Store(&release)
	direct := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	read := stuckRead(t, d, direct)
	f := open(t, d, os.O_RDWR)
	if _, err := f.WriteAt(bytes.Repeat([]byte("lost"), 1024), 8192); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("sync by somebody else: %v, want EIO", err)
	}
	if err := <-read; !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if s := d.State(); s != nbdnl.StateLive {
		t.Errorf("%s: the server has seen it, and there is nothing to show", s)
	}
	b.absence.Store(nil)
	close(release)
	for d.State() == nbdnl.StateLive {
		<-d.Changes()
	}
	awaitState(t, d, nbdnl.StateLive)
	if err := d.Flush(t.Context()); err == nil || errors.Is(err, syscall.EIO) {
		t.Errorf("Flush: %v, want that writes may be lost", err)
	}
	acknowledge(t, d)
	if _, err := f.WriteAt(bytes.Repeat([]byte("kept"), 1024), 8192); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil || !bytes.HasPrefix(b.stored(8192, 4096), []byte("kept")) {
		t.Errorf("second Flush: %v, the backend has %.4q", err, b.stored(8192, 4096))
	}
}

// TestKernelStaleError loses a write without anybody being told: the next device with that index
// has nothing to do with it.
func TestKernelStaleError(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	b.full()(true)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("lost"), 0); err != nil {
		t.Fatal(err)
	}
	f.Close() // The last close writes, and tells nobody.
	if err := d.Kick(t.Context()); err != nil {
		t.Error(err)
	}
	checkLoss(t, "Close", ended(t, d))

	next, err := blockdev.ConnectIndex(t.Context(), d.Index(), newRecorder(1<<20), blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f = open(t, next, os.O_RDWR)
	if err := f.Sync(); err != nil {
		t.Errorf("the first sync of the next device: %v", err)
	}
	f.Close()
	if err := next.Flush(t.Context()); err != nil {
		t.Errorf("its first Flush: %v", err)
	}
	if err := ended(t, next); err != nil {
		t.Errorf("its end: %v", err)
	}
}
