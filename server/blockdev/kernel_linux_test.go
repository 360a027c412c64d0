package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A recorder is a disk that counts what only a backend sees, and fails or waits when told to.
type recorder struct {
	disk
	syncs, fuas, trims atomic.Int64
	before             atomic.Pointer[func(op string, off int64) error]
}

func newRecorder(size int) *recorder { return &recorder{disk: disk{data: make([]byte, size)}} }

// stored returns what the backend has of n bytes at off, asked by nobody but the test.
func (r *recorder) stored(off, n int64) []byte {
	p := make([]byte, n)
	r.disk.ReadAt(p, off)
	return p
}

func (r *recorder) hook(op string, off int64) error {
	if f := r.before.Load(); f != nil {
		return (*f)(op, off)
	}
	return nil
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	if err := r.hook("read", off); err != nil {
		return 0, err
	}
	return r.disk.ReadAt(p, off)
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := r.hook("write", off); err != nil {
		return 0, err
	}
	return r.disk.WriteAt(p, off)
}

func (r *recorder) WriteAtFUA(p []byte, off int64) (int, error) {
	r.fuas.Add(1)
	return r.WriteAt(p, off)
}

func (r *recorder) Sync() error {
	r.syncs.Add(1)
	return r.hook("sync", 0)
}

func (r *recorder) Trim(off, n int64) error {
	r.trims.Add(1)
	return r.disk.Trim(off, n)
}

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
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span))); errno != 0 {
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

// TestKernelData writes and reads past the page cache and through it, and looks at what has arrived in the backend.
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
	if st := d.Export().Stats(); st.Read.Bytes < size || st.Write.Bytes < size || st.Flush.Requests == 0 || st.Read.Errors+st.Write.Errors > 0 {
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

// TestKernelBackendError holds that an error of the backend is an I/O error of its user, and nothing worse.
func TestKernelBackendError(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() }) // where the test has not come as far as its end
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 4096)
	cause := errors.New("head crash")
	fail := func(op string, off int64) error {
		if off == 65536 {
			return cause
		}
		return nil
	}
	b.before.Store(&fail)
	if _, err := f.ReadAt(p, 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := f.WriteAt(p, 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("write: %v, want EIO", err)
	}
	if last := d.Export().LastError(); last == nil || !errors.Is(last, cause) || last.Offset != 65536 {
		t.Errorf("last error %v", last)
	}
	b.before.Store(nil)
	if _, err := f.ReadAt(p, 65536); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	f.Close()
	var loss *server.LossError
	if err := ended(t, d); !errors.As(err, &loss) || loss.Requests != 1 || !errors.Is(loss, cause) {
		t.Errorf("Close: %v, want the write that was lost", err)
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
	if _, err := blockdev.ConnectIndex(t.Context(), 7, newRecorder(1<<20), blockdev.Options{}); !errors.Is(err, nbdnl.ErrBusy) {
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
	if err := d.Disconnect(t.Context()); !errors.As(err, &busy) || len(busy.Holders) == 0 || busy.Holders[0].PID != os.Getpid() {
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

// TestKernelCancel ends the context at random moments of a connect to a backend that is slow at first, and lets the first read
// hang or fail: there is a device, or there is nothing.
func TestKernelCancel(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cause := errors.New("not a readable disk")
	fail := func(string, int64) error { return cause }
	slow := func(string, int64) error {
		<-time.After(100 * time.Millisecond)
		return nil
	}
	rng := rand.New(rand.NewPCG(1, 2))
	const rounds = 30
	var connected int
	var whole time.Duration // what a complete connect takes
	for i := range rounds {
		b := newRecorder(1 << 20)
		limit := time.Minute
		if i > 0 {
			limit = time.Duration(rng.Int64N(int64(2 * whole)))
		}
		start, want := time.Now(), context.DeadlineExceeded
		switch i % 3 {
		case 1:
			b.before.Store(&slow)
		case 2:
			b.before.Store(&fail)
			limit, want = time.Minute, cause
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		o := blockdev.Options{Client: c, Identifier: nbdnl.NewIdentifier("cancelled")}
		d, err := blockdev.Connect(ctx, b, o)
		cancel()
		switch {
		case err == nil:
			connected++
			whole = time.Since(start)
			if err := d.Close(); err != nil {
				t.Errorf("round %d: %v", i, err)
			}
		case !errors.Is(err, want):
			t.Errorf("round %d: %v, want %v", i, err, want)
		}
		devices, err := c.Devices(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range devices {
			if st.Identifier == o.Identifier {
				t.Errorf("round %d: %s is %s", i, nbdnl.Path(st.Index), st.State)
			}
		}
	}
	t.Logf("%d of %d connected; the latest took %v", connected, rounds, whole)
}

// TestKernelTimeout has the backend take longer than the device's timeout: the kernel gives up the connection, the user gets an
// I/O error, and Close removes what is left, though it can't write what is cached any more.
func TestKernelTimeout(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	release := make(chan struct{})
	stall := func(op string, off int64) error {
		if off == 65536 {
			<-release
		}
		return nil
	}
	b.before.Store(&stall)
	start := time.Now()
	if _, err := f.ReadAt(aligned(t, 4096), 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	t.Logf("the kernel gave up after %v", time.Since(start))
	close(release)
	<-d.Done()
	if d.Err() == nil {
		t.Error("the device ended in order")
	}
	f.Close()
	if err := d.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("close: %v, want EIO", err)
	}
	checkFree(t, d.Index(), d.Identifier())
}

// TestKernelStuckBackend ends a device whose backend does not come back from a request: the kernel lets go of it, the caller is
// told, and the device is done when the backend is.
func TestKernelStuckBackend(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d := connect(t, b, blockdev.Options{})
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	arrived, release := make(chan struct{}), make(chan struct{})
	stuck := func(op string, off int64) error {
		if off == 65536 {
			close(arrived)
			<-release
		}
		return nil
	}
	b.before.Store(&stuck)
	read := make(chan error, 1)
	p := aligned(t, 4096)
	go func() {
		_, err := f.ReadAt(p, 65536)
		f.Close()
		read <- err
	}()
	<-arrived

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := d.End(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 requests are still") {
		t.Errorf("error %v, want one that tells of the request", err)
	}
	if err := <-read; !errors.Is(err, syscall.EIO) {
		t.Errorf("the read ended with %v, want EIO", err)
	}
	select {
	case <-d.Done():
		t.Error("done while the backend is at work")
	default:
	}
	close(release)
	<-d.Done()
	if err := d.Err(); err != nil {
		t.Errorf("ended with %v", err)
	}
}
