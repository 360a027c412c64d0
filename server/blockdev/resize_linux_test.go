package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// command runs a command, and fails the test if that fails.
func command(t *testing.T, name string, arg ...string) {
	t.Helper()
	if out, err := exec.Command(name, arg...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(arg, " "), err, out)
	}
}

// sysfs reads a number of the device's directory in sysfs.
func sysfs(t *testing.T, d *blockdev.Device, file string) int64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), file))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// resize resizes a device and looks at what the kernel makes of it.
func resize(t *testing.T, d *blockdev.Device, size int64) {
	t.Helper()
	longest := sysfs(t, d, "queue/max_sectors_kb")
	if err := d.Resize(t.Context(), size); err != nil {
		t.Fatalf("resize from %d to %d: %v", d.Size(), size, err)
	}
	if got := sysfs(t, d, "size") * 512; got != size || d.Size() != size || d.Export().Size() != size {
		t.Errorf("resize to %d: the kernel shows %d, the device says %d, the server has %d",
			size, got, d.Size(), d.Export().Size())
	}
	if got := sysfs(t, d, "queue/max_sectors_kb"); got != longest {
		t.Errorf("resize to %d: max_sectors_kb has changed from %d to %d", size, longest, got)
	}
}

// A volume is a mounted file system with files that are known.
type volume struct {
	t      *testing.T
	device string
	kind   string
	dir    string
	files  map[string][]byte
}

func (v *volume) mount() {
	v.t.Helper()
	if err := unix.Mount(v.device, v.dir, v.kind, 0, ""); err != nil {
		v.t.Fatalf("mount: %v", err)
	}
	v.t.Cleanup(func() { unix.Unmount(v.dir, unix.MNT_DETACH) }) // of a test that has failed
}

func (v *volume) unmount() {
	v.t.Helper()
	if err := unix.Unmount(v.dir, 0); err != nil {
		v.t.Fatalf("unmount: %v", err)
	}
}

// write makes n files of MiB each.
func (v *volume) write(n int) {
	v.t.Helper()
	for range n {
		content := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{byte(len(v.files))}).Read(content)
		name := filepath.Join(v.dir, fmt.Sprint("file", len(v.files)))
		v.files[name] = content
		if err := os.WriteFile(name, content, 0o600); err != nil {
			v.t.Fatal(err)
		}
	}
}

func (v *volume) check() {
	v.t.Helper()
	for name, want := range v.files {
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
			v.t.Errorf("%s has changed (%v)", name, err)
		}
	}
}

func (v *volume) bytes() uint64 {
	v.t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(v.dir, &st); err != nil {
		v.t.Fatal(err)
	}
	return st.Blocks * uint64(st.Bsize)
}

// TestKernelResize grows a device under a mounted file system, which then grows too, and shrinks it
// again where the file system can.
func TestKernelResize(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const mib = 1 << 20
	inMemory := func(t *testing.T, size int64) backends.Backend {
		m, err := memory.New(size, memory.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	inFile := func(t *testing.T, size int64) backends.Backend {
		f, err := file.Open(filepath.Join(t.TempDir(), "disk"), file.Options{Create: true, Size: size})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	growExt4 := func(v *volume) { command(v.t, "resize2fs", v.device) }
	growXFS := func(v *volume) { command(v.t, "xfs_growfs", v.dir) }
	for _, tt := range []struct {
		name, kind   string
		open         func(*testing.T, int64) backends.Backend
		small, large int64
		grow         func(v *volume)
	}{
		{"ext4 in memory", "ext4", inMemory, 64 * mib, 256 * mib, growExt4},
		{"ext4 in a file", "ext4", inFile, 64 * mib, 128 * mib, growExt4},
		{"xfs in memory", "xfs", inMemory, 304 * mib, 640 * mib, growXFS},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := connect(t, tt.open(t, tt.small), blockdev.Options{})
			command(t, "mkfs."+tt.kind, "-q", d.Path())
			v := &volume{t: t, device: d.Path(), kind: tt.kind, dir: t.TempDir(), files: make(map[string][]byte)}
			v.mount()
			v.write(10)
			before := v.bytes()

			resize(t, d, tt.large)
			tt.grow(v)
			if after := v.bytes(); after < before+uint64(tt.large-tt.small)*9/10 {
				t.Errorf("the file system has grown from %d to %d bytes only", before, after)
			}
			v.write(20)
			var busy *nbdnl.BusyError
			err := d.Resize(t.Context(), tt.small)
			if !errors.As(err, &busy) || len(busy.Holders) == 0 || busy.Holders[0].Path != v.dir {
				t.Errorf("shrinking while it is mounted: %v, want a BusyError that names the mount", err)
			}
			v.unmount()
			v.mount()
			v.check()
			v.unmount()
			if tt.kind != "ext4" { // xfs does not shrink.
				command(t, "xfs_repair", "-n", d.Path())
				return
			}
			shrunk := tt.small + 16*mib
			command(t, "e2fsck", "-f", "-p", d.Path())
			command(t, "resize2fs", d.Path(), fmt.Sprint(shrunk>>10)+"K")
			resize(t, d, shrunk)
			command(t, "e2fsck", "-f", "-n", d.Path())
			v.mount()
			v.check()
			v.write(1)
			v.unmount()
			resize(t, d, tt.large)
			command(t, "e2fsck", "-f", "-n", d.Path())
		})
	}
}

// TestKernelResizeUnderLoad grows a device in steps while data are written and read, and looks at
// all of them in the end.
func TestKernelResizeUnderLoad(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const small, step, steps, block, writers = 4 << 20, 1 << 20, 12, 4096, 3
	m, err := memory.New(small, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	d := connect(t, m, blockdev.Options{Connections: 2})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	stop := make(chan struct{})
	want := make([][]byte, writers)
	var wg sync.WaitGroup
	const span = small / writers / block * block
	for w := range writers {
		rng := rand.New(rand.NewPCG(1, uint64(w)))
		want[w] = make([]byte, span)
		p, q := aligned(t, block), aligned(t, block)
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				off := rng.Int64N(span/block) * block
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				copy(want[w][off:], p)
				at := int64(w)*span + off
				if _, err := f.WriteAt(p, at); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				if _, err := f.ReadAt(q, at); err != nil || !bytes.Equal(p, q) {
					t.Errorf("read at %d: other data than were written (%v)", at, err)
					return
				}
			}
		})
	}
	end := aligned(t, block)
	for i := range int64(steps) {
		size := small + (i+1)*step
		resize(t, d, size)
		copy(end, fmt.Sprint("end ", i))
		if _, err := f.WriteAt(end, size-block); err != nil {
			t.Errorf("write at the new end: %v", err)
		}
		<-time.After(20 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	for w := range want {
		got := make([]byte, span)
		if _, err := m.ReadAt(got, int64(w)*span); err != nil || !bytes.Equal(got, want[w]) {
			t.Errorf("writer %d: the backend has other data (%v)", w, err)
		}
	}
	for i := range int64(steps) {
		got := make([]byte, 8)
		m.ReadAt(got, small+(i+1)*step-block)
		if s := strings.TrimRight(string(got), "\x00"); s != fmt.Sprint("end ", i) {
			t.Errorf("at the end of step %d: %q", i, s)
		}
	}
}

// TestKernelForceResize shrinks a device with dirty pages behind the new end: they are lost, and
// nothing else is.
func TestKernelForceResize(t *testing.T) {
	nbdnltest.RequireKernel(t)
	m, err := memory.New(8<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	d := connect(t, m, blockdev.Options{})
	f := open(t, d, os.O_RDWR)
	for _, off := range []int64{0, 6 << 20} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 1<<20), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Resize(t.Context(), 4<<20); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("without force: %v, want ErrBusy", err)
	}
	if err := d.ForceResize(t.Context(), 4<<20); err != nil {
		t.Fatal(err)
	}
	t.Logf("the cache is written: %v", f.Sync()) // Some of it has nowhere to go.
	f.Sync()
	if m.Size() != 4<<20 || d.State() != nbdnl.StateLive {
		t.Errorf("the backend has %d bytes, the device is %s", m.Size(), d.State())
	}
	got := make([]byte, 1<<20)
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, 1<<20)) {
		t.Errorf("what lies before the new end is lost (%v)", err)
	}
	f.Close()
	resize(t, d, 8<<20)
	g := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 1<<20)
	if _, err := g.ReadAt(p, 6<<20); err != nil || !bytes.Equal(p, make([]byte, 1<<20)) {
		t.Errorf("what is added again is not zeros (%v)", err)
	}
	g.Close()
}
