package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// connect makes a device of b, which ends with the test at the latest.
func connect(t *testing.T, b backends.Backend, o blockdev.Options) *blockdev.Device {
	t.Helper()
	d, err := blockdev.Connect(t.Context(), b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close %s: %v", d.Path(), err)
		}
		checkFree(t, d.Index(), d.Identifier())
	})
	return d
}

// checkFree fails the test if the device is still connected.
func checkFree(t *testing.T, index int, identifier string) {
	t.Helper()
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	st, err := c.Status(context.Background(), index)
	if err != nil {
		t.Fatal(err)
	}
	if st.Connected() && st.Identifier == identifier {
		t.Errorf("%s is still %s", nbdnl.Path(index), st.State)
	}
}

// open opens the device, with O_DIRECT among the flags or not.
func open(t *testing.T, d *blockdev.Device, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(d.Path(), flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned returns n bytes that may be used with O_DIRECT.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(p) })
	return p
}

// discard is blkdiscard(8).
func discard(f *os.File, off, n uint64) error {
	span := [2]uint64{off, n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

// TestKernelExample runs the example.
func TestKernelExample(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d := &disk{data: make([]byte, 1<<20)}
	err := serve(t.Context(), d, func(path string) error {
		return os.WriteFile(path, []byte("hello, kernel"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	// Close has written what the kernel had cached.
	if !bytes.HasPrefix(d.data, []byte("hello, kernel")) {
		t.Errorf("the disk begins with %q", d.data[:13])
	}
}

// TestKernelData writes and reads past the page cache and through it, and looks at what has arrived
// in the backend.
func TestKernelData(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size = 8 << 20
	b := newRecorder(size)
	d := connect(t, b, blockdev.Options{})
	want := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})

	direct := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 1<<20)
	for off := int64(0); off < size/2; off += 1 << 20 {
		rng.Read(p)
		copy(want[off:], p)
		if _, err := direct.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	buffered := open(t, d, os.O_RDWR)
	rng.Read(want[size/2 : size-512])
	if _, err := buffered.WriteAt(want[size/2:], size/2); err != nil {
		t.Fatal(err)
	}
	before := b.syncs.Load()
	if err := buffered.Sync(); err != nil {
		t.Fatal(err)
	}
	if b.syncs.Load() == before {
		t.Error("fsync returned without a Sync of the backend")
	}
	if !bytes.Equal(b.stored(0, size), want) {
		t.Error("the backend has something else than what was written")
	}

	want[size-1] = 0x55
	b.disk.WriteAt(want[size-1:], size-1) // behind the kernel's back: what is read must come from here
	for off := int64(0); off < size; off += 1 << 20 {
		if _, err := direct.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want[off:off+1<<20]) {
			t.Errorf("the MiB at %d reads back changed", off)
		}
	}
	if n, _ := direct.ReadAt(p, size); n != 0 {
		t.Errorf("%d bytes were read behind the end", n)
	}
	st := d.Export().Stats()
	if st.Read.Bytes < size || st.Write.Bytes < size || st.Flush.Requests == 0 || st.Read.Errors+st.Write.Errors > 0 {
		t.Errorf("stats %+v", st)
	}
}

// TestKernelDurability holds that a synchronous write arrives as FUA, and a discard as a trim.
func TestKernelDurability(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d := connect(t, b, blockdev.Options{})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT|syscall.O_DSYNC)
	p := aligned(t, 4096)
	copy(p, "durable")
	if _, err := f.WriteAt(p, 4096); err != nil {
		t.Fatal(err)
	}
	if got := b.stored(4096, 7); b.fuas.Load() == 0 || string(got) != "durable" {
		t.Errorf("%d FUA writes, stored %q", b.fuas.Load(), got)
	}
	if err := discard(f, 4096, 4096); err != nil {
		t.Fatal(err)
	}
	if got := b.stored(4096, 7); b.trims.Load() == 0 || got[0] != 0 {
		t.Errorf("%d trims, stored %q", b.trims.Load(), got)
	}
}

// TestKernelReadOnly holds that a reader is a read-only device.
func TestKernelReadOnly(t *testing.T) {
	nbdnltest.RequireKernel(t)
	content := bytes.Repeat([]byte("read me."), 1<<17)
	d := connect(t, bytes.NewReader(content), blockdev.Options{})
	if !d.ReadOnly() {
		t.Error("the device says that it can be written")
	}
	got, err := os.ReadFile(d.Path())
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes that are right: %t, error %v", len(got), bytes.Equal(got, content), err)
	}
	f, err := os.OpenFile(d.Path(), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("x"), 0)
		f.Close()
	}
	if !errors.Is(err, os.ErrPermission) {
		t.Errorf("write: %v, want EPERM", err)
	}
}

// TestKernelMemory fills a device from backends/memory beside another, which must not notice.
func TestKernelMemory(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const size = 4 << 20
	var paths []string
	for i := range 2 {
		m, err := memory.New(size, memory.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		d := connect(t, m, blockdev.Options{BlockSize: 512 << (3 * i)}) // 512 and 4096
		paths = append(paths, d.Path())
	}
	for i, path := range paths {
		if err := os.WriteFile(path, bytes.Repeat([]byte{'a' + byte(i)}, size), 0); err != nil {
			t.Fatal(err)
		}
	}
	for i, path := range paths {
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{'a' + byte(i)}, size)) {
			t.Errorf("%s has other content than what was written, error %v", path, err)
		}
	}
}

// TestKernelIndex asks for one index, twice, and for a block size that hardly any kernel has.
func TestKernelIndex(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d, err := blockdev.ConnectIndex(t.Context(), 7, newRecorder(1<<20), blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d.Index() != 7 || d.Path() != "/dev/nbd7" {
		t.Errorf("asked for nbd7, got index %d, %s", d.Index(), d.Path())
	}
	_, err = blockdev.ConnectIndex(t.Context(), 7, newRecorder(1<<20), blockdev.Options{})
	if !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("the same index again: %v, want ErrBusy", err)
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkFree(t, 7, d.Identifier())

	d, err = blockdev.ConnectIndex(t.Context(), 7, newRecorder(1<<20), blockdev.Options{BlockSize: 65536})
	switch {
	case err == nil: // Linux 7.2 with huge pages
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	case !errors.Is(err, errors.ErrUnsupported):
		t.Errorf("a block size of 65536: %v, want ErrUnsupported", err)
	}
}

// TestKernelHeld holds a device open, or disconnects it from elsewhere.
func TestKernelHeld(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d := connect(t, b, blockdev.Options{})
	f := open(t, d, os.O_RDWR)
	var busy *nbdnl.BusyError
	err := d.Disconnect(t.Context())
	if !errors.As(err, &busy) || len(busy.Holders) == 0 || busy.Holders[0].PID != os.Getpid() {
		t.Errorf("error %v, want one that names this process", err)
	}
	if _, err := f.WriteAt([]byte("still there"), 0); err != nil {
		t.Errorf("after the refusal: %v", err)
	}
	if err := f.Close(); err != nil { // writes what is cached
		t.Fatal(err)
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if string(b.stored(0, 11)) != "still there" {
		t.Error("what was written before the refusal is lost")
	}
	if err := d.Err(); err != nil {
		t.Errorf("ended with %v", err)
	}

	d = connect(t, b, blockdev.Options{})
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Detach(t.Context(), d.Index(), nbdnl.DetachOptions{Any: true}); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if err := d.Err(); err != nil {
		t.Errorf("disconnected by another: ended with %v", err)
	}
}
