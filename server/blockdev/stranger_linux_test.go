package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

const (
	// maxStrangerIndex is above the indexes that strangers choose from: those which the module has
	// from the beginning.
	maxStrangerIndex = 16
	// strangerPatience bounds each run of another program.
	strangerPatience = 60 * time.Second
	// strangerPause is how often a stranger makes a device, at most: starting programs is what
	// takes the longest.
	strangerPause = 500 * time.Millisecond
)

// A stranger is another program that attaches a device of its own, time after time.
type stranger struct {
	name string
	// attach returns nil if somebody else has the index.
	attach func(ctx context.Context, path string) *session
	// detach is the command that ends a device.
	detach []string
	// stored returns what has arrived where the device keeps its bytes.
	stored func() ([]byte, error)
	close  func()

	// first and step are those of the indexes that it takes. Two that use ioctls must not meet: the
	// nbd-client that comes second gives NBD_CLEAR_SOCK to the device of the first.
	first, step int

	verified, lost int
}

// A session is one device of a stranger.
type session struct {
	// wait returns when the program that serves the device or keeps it has ended; nil if there is
	// none.
	wait func() error
}

// churn makes one device after the other until stop is closed.
func (o *stranger) churn(t *testing.T, rng *rand.Rand, stop <-chan struct{}) {
	content := make([]byte, soakSize)
	pause := time.NewTicker(strangerPause)
	defer pause.Stop()
	for !t.Failed() {
		select {
		case <-stop:
			return
		case <-pause.C:
		}
		if err := o.round(t, rng, content); err != nil {
			t.Errorf("%s: %v", o.name, err)
		}
	}
}

// round makes one device, writes a pattern to all of it, and looks that it stays what it is.
func (o *stranger) round(t *testing.T, rng *rand.Rand, content []byte) error {
	ctx, cancel := context.WithTimeout(t.Context(), strangerPatience)
	defer cancel()
	path, ok := o.freeDevice(rng)
	if !ok {
		return nil
	}
	s := o.attach(ctx, path)
	if s == nil {
		o.lost++
		return nil
	}
	useErr := useDevice(t, rng, path, content)
	out, err := exec.CommandContext(ctx, o.detach[0], append(o.detach[1:], path)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: detach: %w: %s", path, err, out)
	}
	if s.wait != nil {
		_ = s.wait() // its exit code says how it liked to be disconnected
	}
	if useErr != nil {
		return fmt.Errorf("%s: %w", path, useErr)
	}
	stored, err := o.stored()
	if err != nil || !bytes.Equal(stored, content) {
		return fmt.Errorf("%s: something else has arrived than what was written, error %v", path, err)
	}
	o.verified++
	return nil
}

// freeDevice finds a device that nobody had a moment ago, in the way in which these programs and
// their users do it.
func (o *stranger) freeDevice(rng *rand.Rand) (path string, ok bool) {
	n := maxStrangerIndex / o.step
	for _, i := range rng.Perm(n) {
		path := nbdnl.Path(o.first + i*o.step)
		if _, err := os.Stat(filepath.Join("/sys/block", filepath.Base(path), "pid")); errors.Is(err, os.ErrNotExist) {
			return path, true
		}
	}
	return "", false
}

// useDevice writes all of the device, past the page cache, and reads it again for some time.
func useDevice(t *testing.T, rng *rand.Rand, path string, content []byte) error {
	fill(rng, content)
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p, free := directBuffer(t, len(content))
	defer free()
	copy(p, content)
	if _, err := f.WriteAt(p, 0); err != nil {
		return err
	}
	for range 5 {
		<-time.After(10 * time.Millisecond)
		clear(p)
		if _, err := f.ReadAt(p, 0); err != nil {
			return err
		}
		if !bytes.Equal(p, content) {
			return fmt.Errorf("something else is read than what was written")
		}
	}
	return nil
}

// netlinkClient is nbd-client as it is by default: it has gone when the device is there.
func netlinkClient(t *testing.T, srv *server.Server, l net.Listener) *stranger {
	o := newClient(t, srv, "netlink")
	o.first, o.step = 0, 1
	o.detach = []string{"nbd-client", "-d"}
	o.attach = func(ctx context.Context, path string) *session {
		attach := exec.CommandContext(ctx, "nbd-client", "-u", l.Addr().String(), "-N", "netlink", path)
		if err := attach.Run(); err != nil {
			return nil
		}
		return &session{}
	}
	return o
}

// ioctlClient is nbd-client by ioctls, which stays for as long as the device does.
func ioctlClient(t *testing.T, srv *server.Server, l net.Listener) *stranger {
	o := newClient(t, srv, "ioctl")
	o.first, o.step = 0, 2
	o.detach = []string{"nbd-client", "-L", "-d"}
	o.attach = func(ctx context.Context, path string) *session {
		return attachIoctl(ctx, path, "nbd-client", "-n", "-L", "-u", l.Addr().String(), "-N", "ioctl", path)
	}
	return o
}

// newClient adds an export to the server for an nbd-client that is to be made.
func newClient(t *testing.T, srv *server.Server, name string) *stranger {
	t.Helper()
	m, err := memory.New(soakSize, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if srv.Exports[name], err = server.NewExport(m, server.Options{}); err != nil {
		t.Fatal(err)
	}
	stored := make([]byte, soakSize)
	return &stranger{
		name:   "nbd-client by " + name,
		close:  func() { m.Close() },
		stored: func() ([]byte, error) { _, err := m.ReadAt(stored, 0); return stored, err },
	}
}

// qemuNBD is qemu-nbd, which serves its device itself.
func qemuNBD(t *testing.T, image string) *stranger {
	t.Helper()
	if err := os.WriteFile(image, make([]byte, soakSize), 0o600); err != nil {
		t.Fatal(err)
	}
	return &stranger{
		name: "qemu-nbd",
		attach: func(ctx context.Context, path string) *session {
			// Without -v it would go into the background.
			return attachIoctl(ctx, path, "qemu-nbd", "-v", "-f", "raw", "-c", path, image)
		},
		detach: []string{"qemu-nbd", "-d"},
		stored: func() ([]byte, error) { return os.ReadFile(image) },
		close:  func() {},
		first:  1,
		step:   2,
	}
}

// attachIoctl starts a program that keeps its device for as long as it runs. It returns when the
// device is that program's, or the program has found out that it is somebody else's.
func attachIoctl(ctx context.Context, path string, name string, arg ...string) *session {
	cmd := exec.CommandContext(ctx, name, arg...)
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for !ownedBy(path, cmd.Process.Pid) {
		select {
		case <-ended:
			return nil
		case <-look.C:
		}
	}
	return &session{wait: func() error { return <-ended }}
}

// ownedBy reports whether the device is connected by a thread of the process, and has its size.
func ownedBy(path string, pid int) bool {
	dir := filepath.Join("/sys/block", filepath.Base(path))
	tid, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		return false
	}
	thread := filepath.Join("/proc", strconv.Itoa(pid), "task", strings.TrimSpace(string(tid)))
	if _, err := os.Stat(thread); err != nil {
		return false
	}
	size, err := os.ReadFile(filepath.Join(dir, "size"))
	return err == nil && strings.TrimSpace(string(size)) == strconv.Itoa(soakSize/512)
}

// fill makes content that is another each time.
func fill(rng *rand.Rand, p []byte) {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rng.Uint32())
	}
	rand.NewChaCha8(seed).Read(p)
	clear(p[:min(len(p), 4096)]) // nothing there may look like a table of partitions
}

// directBuffer returns n bytes that may be used with O_DIRECT until they are freed.
func directBuffer(t *testing.T, n int) (p []byte, free func()) {
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Error(err)
		return make([]byte, n), func() {}
	}
	return p, func() { unix.Munmap(p) }
}
