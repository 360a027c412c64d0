package nbdnl_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// wantBusy checks that the device can't be detached because of one holder of that kind and path,
// and returns the holder.
func (w world) wantBusy(index int, identifier string, kind holder.Kind, path string) holder.Holder {
	w.Helper()
	err := w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: identifier})
	var busy *nbdnl.BusyError
	if !errors.As(err, &busy) || busy.Disconnected {
		w.Fatalf("detach of a held device: %v", err)
	}
	w.wantState(index, nbdnl.StateLive)
	for _, h := range busy.Holders {
		if h.Kind == kind && h.Path == path {
			return h
		}
	}
	w.Fatalf("holders are %+v, want a %v on %s", busy.Holders, kind, path)
	return holder.Holder{}
}

func (w world) wantDetached(index int, identifier string) {
	w.Helper()
	w.wantDone("detach", w.Detach(w.Context(), index, nbdnl.DetachOptions{Identifier: identifier}))
	w.wantState(index, nbdnl.StateIdle)
}

func TestKernelDetachWritesWhatIsCached(t *testing.T) {
	w := kernelWorld(t)
	cfg, r := disk(t, 4)
	index := w.connect(cfg)
	data := bytes.Repeat([]byte("nbd"), 1<<20)
	f, err := os.OpenFile(nbdnl.Path(index), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Another descriptor keeps the kernel from writing back at the close of the one that wrote.
	holder, err := os.Open(nbdnl.Path(index))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(data)
	w.wantDone("write", errors.Join(err, f.Close()))
	if r.begins(data) {
		t.Fatal("all is written already, so this shows nothing")
	}
	time.AfterFunc(50*time.Millisecond, func() { holder.Close() })
	w.wantDetached(index, cfg.Identifier)
	<-r.done
	if !r.begins(data) {
		t.Error("cached data was lost")
	}
	if r.flushes.Load() == 0 || r.unflushed.Load() != 0 {
		t.Errorf("%d flushes, %d bytes written after the last", r.flushes.Load(), r.unflushed.Load())
	}
}

func TestKernelDetachMounted(t *testing.T) {
	w := kernelWorld(t)
	cfg, _ := disk(t, 8)
	index := w.connect(cfg)
	run(t, "mkfs.ext4", "-q", nbdnl.Path(index))
	dir := filepath.Join(t.TempDir(), "a b")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(nbdnl.Path(index), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	if h := w.wantBusy(index, cfg.Identifier, holder.Mount, dir); h.PID != 0 {
		t.Errorf("a mount of this namespace is said to be that of process %d", h.PID)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	w.wantDetached(index, cfg.Identifier)
}

func TestKernelDetachMountedElsewhere(t *testing.T) {
	w := kernelWorld(t)
	cfg, _ := disk(t, 8)
	index := w.connect(cfg)
	run(t, "mkfs.ext4", "-q", nbdnl.Path(index))
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", `mount "$0" "$1" && echo mounted && read end`, nbdnl.Path(index), dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n, err := stdout.Read(make([]byte, 64)); n == 0 {
		t.Fatalf("it did not mount: %v", err)
	}
	if h := w.wantBusy(index, cfg.Identifier, holder.Mount, dir); h.PID != cmd.Process.Pid || h.Comm != "sh" {
		t.Errorf("holder is %+v, want sh with pid %d", h, cmd.Process.Pid)
	}
	stdin.Close()
	_ = cmd.Wait() // read fails at the end of input
	w.wantDetached(index, cfg.Identifier)
}

func TestKernelDetachSwap(t *testing.T) {
	w := kernelWorld(t)
	cfg, _ := disk(t, 4)
	index := w.connect(cfg)
	path := nbdnl.Path(index)
	run(t, "mkswap", path)
	run(t, "swapon", path)
	t.Cleanup(func() { _ = exec.Command("swapoff", path).Run() })
	w.wantBusy(index, cfg.Identifier, holder.Swap, path)
	run(t, "swapoff", path)
	w.wantDetached(index, cfg.Identifier)
}

func TestKernelDetachBelowDeviceMapper(t *testing.T) {
	w := kernelWorld(t)
	if err := exec.Command("dmsetup", "version").Run(); err != nil {
		t.Skipf("no device mapper: %v", err)
	}
	cfg, _ := disk(t, 4)
	index := w.connect(cfg)
	mapped := fmt.Sprintf("nbdnl-test-%d", os.Getpid())
	run(t, "dmsetup", "create", mapped, "--table", fmt.Sprintf("0 2048 linear %s 0", nbdnl.Path(index)))
	t.Cleanup(func() { _ = exec.Command("dmsetup", "remove", mapped).Run() })
	w.wantBusy(index, cfg.Identifier, holder.Device, mapped)
	run(t, "dmsetup", "remove", mapped)
	w.wantDetached(index, cfg.Identifier)
}

func TestKernelDetachOpenedExclusively(t *testing.T) {
	w := kernelWorld(t)
	cfg, _ := disk(t, 4)
	index := w.connect(cfg)
	f, err := os.OpenFile(nbdnl.Path(index), os.O_RDONLY|syscall.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if h := w.wantBusy(index, cfg.Identifier, holder.Process, nbdnl.Path(index)); h.PID != os.Getpid() {
		t.Errorf("holder is process %d, want this one, %d", h.PID, os.Getpid())
	}
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}

// A descriptor of O_PATH does not open the device.
func TestKernelHoldersPathOnly(t *testing.T) {
	w := kernelWorld(t)
	cfg, _ := disk(t, 4)
	index := w.connect(cfg)
	fd, err := unix.Open(nbdnl.Path(index), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	holders, err := holder.Find(t.Context(), index)
	w.wantDone("holders", err)
	for _, h := range holders {
		if h.PID == os.Getpid() {
			t.Errorf("this process is said to be a %v", h)
		}
	}
}

func TestKernelDetachDropsPartitions(t *testing.T) {
	w := kernelWorld(t)
	// A partition table with one entry: type 83, from sector 64 on, 1024 sectors.
	r := newResponder(t)
	r.data = make([]byte, mebi)
	r.data[510], r.data[511] = 0x55, 0xaa
	r.data[446+4] = 0x83
	binary.LittleEndian.PutUint32(r.data[446+8:], 64)
	binary.LittleEndian.PutUint32(r.data[446+12:], 1024)
	cfg := config(r.start(t))
	index := w.connect(cfg)
	partitions, err := w.WaitReady(t.Context(), index)
	w.wantDone("wait until ready", err)
	if want := []string{fmt.Sprintf("nbd%dp1", index)}; !slices.Equal(partitions, want) {
		t.Fatalf("partitions are %v, want %v", partitions, want)
	}
	partition := fmt.Sprintf("/sys/block/nbd%d/nbd%[1]dp1", index)
	p, err := os.Open(nbdnl.Path(index) + "p1")
	if err != nil {
		t.Fatal(err)
	}
	h := w.wantBusy(index, cfg.Identifier, holder.Process, nbdnl.Path(index)+"p1")
	if want := filepath.Base(partition); h.Device != want {
		t.Errorf("device held is %s, want %s", h.Device, want)
	}
	p.Close()
	w.wantDetached(index, cfg.Identifier)
	if _, err := os.Stat(partition); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the partition outlives the device: %v", err)
	}
}

func TestKernelDetachHungServer(t *testing.T) {
	w := kernelWorld(t)
	r := newResponder(t)
	r.stuck.Store(true)
	r.start(t)
	cfg := config(r)
	cfg.Timeout = 60 * time.Second
	index := w.connect(cfg)

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	// The open waits for the partition scan.
	err := w.Detach(ctx, index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
	w.wantError(err, context.DeadlineExceeded)
	w.wantState(index, nbdnl.StateLive)

	begin := time.Now()
	ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	err = w.Detach(ctx, index, nbdnl.DetachOptions{Identifier: cfg.Identifier, Force: true})
	if err == nil {
		t.Error("a forced detach does not say that nothing could be flushed")
	}
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("forced detach took %v", d)
	}
	close(r.gate)
	w.wantDone("wait", w.WaitFree(t.Context(), index))
	w.wantState(index, nbdnl.StateIdle)
}

// Without a timeout, a server that has stopped reading makes DISCONNECT sleep in a send, and with
// it every generic netlink command of the machine.
func TestKernelDisconnectStuckInKernel(t *testing.T) {
	w := kernelWorld(t)
	cfg, r := disk(t, 16)
	cfg.Timeout = 0
	index := w.connect(cfg)
	f, err := os.OpenFile(nbdnl.Path(index), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	r.stuck.Store(true)
	written := make(chan error, 1)
	go func() {
		_, err := f.Write(make([]byte, 8<<20)) // more than a socket holds
		written <- errors.Join(err, f.Sync(), f.Close())
	}()
	for queued(t, r.ours) < 100_000 { // and the rest of 8 MiB finds no room
		<-time.After(5 * time.Millisecond)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	w.wantError(w.Drop(ctx, index, cfg.Identifier), context.DeadlineExceeded)

	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	devices, err := w.Devices(ctx)
	w.wantError(err, context.DeadlineExceeded)
	if len(devices) < 16 {
		t.Errorf("%d devices are listed while the kernel is stuck", len(devices))
	}
	// A program that begins only now sees what sysfs shows, which needs no search for the driver.
	late, err := nbdnl.New()
	w.wantDone("new", err)
	defer late.Close()
	world{T: t, Client: late}.wantState(index, nbdnl.StateLive)
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	w.wantError(late.Probe(ctx), context.DeadlineExceeded)

	r.ours.Close() // frees the sender, and the disconnect behind it
	if err := <-written; err == nil {
		t.Error("what the server never read counts as written")
	}
	close(r.gate)
	w.wantDone("wait", w.WaitFree(t.Context(), index))
}

// queued returns how many bytes wait to be read.
func queued(t testing.TB, conn net.Conn) (n int) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if controlErr := raw.Control(func(fd uintptr) {
		n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ)
	}); errors.Join(err, controlErr) != nil {
		t.Fatal(err, controlErr)
	}
	return n
}
