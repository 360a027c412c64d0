package nbdnl_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// Traps of those who open, mount and disconnect devices.

// A device that somebody merely has open, as udev does, is busy.
func TestKernelTrap01OpenIsBusy(t *testing.T) {
	w, k := trapWorld(t)
	index := w.idle()
	f := w.open(index, os.O_RDONLY)
	s := observe(t)
	if err := k.connect(index, kernelEnds(s), number(nbdAttrSize, mebi)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("connect of an open device: %v, want EBUSY", err)
	}

	w.wantState(index, nbdnl.StateHeld)
	cfg := witnessed(s)
	err := w.impatiently(nbdnl.ErrBusy, func(ctx context.Context) error { return w.ConnectIndex(ctx, index, cfg) })
	var busy *nbdnl.BusyError
	if !errors.As(err, &busy) || busy.Disconnected || len(busy.Holders) != 1 || busy.Holders[0].PID != os.Getpid() {
		t.Errorf("error is %v, want one that names this process", err)
	}
	if other := w.connect(cfg); other == index {
		t.Errorf("nbd%d was chosen, which is open", index)
	}
	f.Close()
	w.wantState(index, nbdnl.StateIdle)
}

// DISCONNECT of a mounted device succeeds, and the mount goes on with a device that only fails.
func TestKernelTrap11DisconnectMounted(t *testing.T) {
	w, k := trapWorld(t)
	cfg, _ := disk(t, 8)
	index := w.connect(cfg)
	run(t, "mkfs.ext4", "-q", nbdnl.Path(index))
	dir := t.TempDir()
	if err := unix.Mount(nbdnl.Path(index), dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatal(err)
	}
	unmount := func() error { return unix.Unmount(dir, 0) }
	t.Cleanup(func() { _ = unmount() })
	w.wantBusy(index, cfg.Identifier, holder.Mount, dir)

	w.wantDone("bare disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	if err := w.within("read", soon, w.read(f, 0)); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of a device that is disconnected: %v, want EIO", err)
	}
	f.Close()
	if size := w.status(index).Size; size != cfg.Size {
		t.Errorf("its size is %d, want that of before", size)
	}
	w.wantState(index, nbdnl.StateDisconnecting)
	s := observe(t)
	if err := k.connect(index, kernelEnds(s), number(nbdAttrSize, mebi)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("connect of the index: %v, want EBUSY", err)
	}
	w.wantDone("unmount", unmount())
	w.wantDone("wait", w.WaitFree(t.Context(), index))
	w.wantState(index, nbdnl.StateIdle)
}

// DISCONNECT drops what is cached. fsync tells of it, and but once if there is nothing to flush.
func TestKernelTrap12DisconnectDropsCached(t *testing.T) {
	w, k := trapWorld(t)
	data := bytes.Repeat([]byte("nbd"), 100_000)
	for _, tt := range []struct {
		flags       nbdnl.Flags
		again       error
		description string
	}{{0, nil, "without"}, {nbdnl.FlagSendFlush, syscall.EIO, "with"}} {
		cfg, r := disk(t, 4)
		cfg.Flags = tt.flags
		index := w.connect(cfg)
		f := w.open(index, os.O_RDWR)
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
		w.wantBusy(index, cfg.Identifier, holder.Process, nbdnl.Path(index))
		if r.writes.Load() > 0 {
			t.Fatal("something was written already, so this shows nothing")
		}
		k.disconnect(index)
		<-r.done
		if n := r.writes.Load(); n > 0 {
			t.Errorf("%d writes reached the server before the disconnect", n)
		}
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("fsync: %v, want EIO", err)
		}
		if err := f.Sync(); !errors.Is(err, tt.again) {
			t.Errorf("second fsync %s flushes: %v, want %v", tt.description, err, tt.again)
		}
		f.Close()
		w.wantState(index, nbdnl.StateIdle)
	}

	// In good order nothing is lost, neither in the kernel nor in the server's cache.
	cfg, r := disk(t, 4)
	index := w.connect(cfg)
	w.wantDone("write", os.WriteFile(nbdnl.Path(index), data, 0))
	w.wantDetached(index, cfg.Identifier)
	<-r.done
	if !r.begins(data) || r.unflushed.Load() != 0 {
		t.Errorf("what was cached before Detach has arrived: %t, but for %d bytes it is flushed",
			r.begins(data), r.unflushed.Load())
	}
}

// A device that is to go with its last user goes with its first prober, unless it is told when it
// is open.
func TestKernelTrap13DisconnectOnClose(t *testing.T) {
	w := kernelWorld(t)
	s := observe(t)
	cfg := witnessed(s)
	cfg.ClientFlags = nbdnl.DisconnectOnClose
	index := w.connect(cfg)
	w.open(index, os.O_RDONLY).Close()
	w.wantGone(s, "a prober has closed the device")
	w.wantState(index, nbdnl.StateIdle)

	s = observe(t)
	cfg = witnessed(s)
	index = w.connect(cfg)
	user := w.open(index, os.O_RDONLY)
	flags := nbdnl.DisconnectOnClose
	w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{ClientFlags: &flags})
	w.open(index, os.O_RDONLY).Close()
	w.wantState(index, nbdnl.StateLive)
	user.Close()
	w.wantGone(s, "its user has closed the device")
	w.wantState(index, nbdnl.StateIdle)
}

// The index of a device that is to be destroyed can't be used while it is on its way out, and that
// is not even said as EBUSY.
func TestKernelTrap14DestroyOnDisconnect(t *testing.T) {
	w := kernelWorld(t)
	nbdnltest.Removal.Need(t)
	const index = 50
	s := observe(t)
	cfg := witnessed(s)
	cfg.ClientFlags = nbdnl.DestroyOnDisconnect
	w.wantDone("connect", w.ConnectIndex(t.Context(), index, cfg))
	user := w.open(index, os.O_RDONLY)
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	w.wantGone(s, "it was disconnected")

	next := witnessed(observe(t))
	err := w.ConnectIndex(t.Context(), index, next)
	if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "going down") {
		t.Errorf("connect: %v, want EINVAL that speaks of going down", err)
	}
	user.Close()
	// The kernel removes it from a queue of work of its own.
	for patience := time.Now().Add(soon); ; <-time.After(5 * time.Millisecond) {
		if _, err = w.Status(t.Context(), index); err != nil || time.Now().After(patience) {
			break
		}
	}
	w.wantError(err, os.ErrNotExist)
	for patience := time.Now().Add(soon); ; <-time.After(5 * time.Millisecond) {
		// The directory in sysfs has gone before the index is free.
		err = w.ConnectIndex(t.Context(), index, next)
		if !errors.Is(err, syscall.EINVAL) || time.Now().After(patience) {
			break
		}
	}
	w.wantDone("connect anew", err)
	w.wantDetached(index, next.Identifier)
}

// The first open waits for the server, in the partition scan, and all others behind it.
func TestKernelTrap15OpenWaitsForServer(t *testing.T) {
	w := kernelWorld(t)
	s := observe(t)
	s.holdAt(0)
	cfg := witnessed(s)
	index := w.connect(cfg)
	openClose := func() error {
		f, err := os.Open(nbdnl.Path(index))
		if err == nil {
			f.Close()
		}
		return nil // whether it fails in the end is up to the kernel
	}
	first := async(openClose)
	w.keeps(s)
	second := async(openClose)
	wantStuck(w, "the second open", 300*time.Millisecond, second)
	wantStuck(w, "the first open", 0, first)

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := w.Detach(ctx, index, nbdnl.DetachOptions{Identifier: cfg.Identifier})
	if err == nil {
		t.Error("a device could be flushed that can't be opened")
	}
	w.wantState(index, nbdnl.StateLive)
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	_ = w.within("the first open", soon, first)
	_ = w.within("the second open", soon, second)
	w.wantState(index, nbdnl.StateIdle)
}

// Partitions outlive their device until somebody opens it.
func TestKernelTrap16StalePartitions(t *testing.T) {
	w, k := trapWorld(t)
	for _, tt := range []struct {
		name  string
		end   func(index int, identifier string)
		stale bool
	}{
		{"bare disconnect", func(index int, _ string) { k.disconnect(index) }, true},
		{"detach", w.wantDetached, false},
	} {
		// A partition table with one entry: type 83, from sector 64 on, 1024 sectors.
		r := newResponder(t)
		r.data = make([]byte, mebi)
		r.data[510], r.data[511] = 0x55, 0xaa
		r.data[446+4] = 0x83
		binary.LittleEndian.PutUint32(r.data[446+8:], 64)
		binary.LittleEndian.PutUint32(r.data[446+12:], 1024)
		cfg := config(r.start(t))
		index := w.connect(cfg)
		w.open(index, os.O_RDONLY).Close() // scans
		exists := func() bool {
			disk := filepath.Base(nbdnl.Path(index))
			_, err := os.Stat(filepath.Join("/sys/block", disk, disk+"p1"))
			return err == nil
		}
		if !exists() {
			t.Fatal("the kernel has found no partition")
		}
		tt.end(index, cfg.Identifier)
		w.wantState(index, nbdnl.StateIdle)
		if got := exists(); got != tt.stale {
			t.Errorf("%s: the partition is there: %t, want %t", tt.name, got, tt.stale)
		}
		w.open(index, os.O_RDONLY).Close()
		if exists() {
			t.Errorf("%s: the partition survives an open", tt.name)
		}
	}
}

// A device whose block size is not given has 1024 bytes, and a table of partitions is found only at
// the block size that it was made for.
func TestKernelTrap23BlockSize(t *testing.T) {
	w, k := trapWorld(t)
	index := w.idle()
	err := k.connect(index, kernelEnds(observe(t)), number(nbdAttrSize, mebi), number(nbdAttrFlags, 1))
	w.wantDone("connect", err)
	w.wantSetting(index, "queue/logical_block_size", "1024", "it is what the kernel takes when nothing is said")
	k.disconnect(index)

	image := make([]byte, 4*mebi)
	for _, tt := range []struct {
		blockSize  int
		use        func(t *testing.T, path string)
		partitions int
	}{
		{512, partition, 0}, // not scanned after that
		{512, nil, 2},
		{1024, nil, 0},
		{4096, nil, 0},
	} {
		r := newResponder(t)
		r.data = image // of one disk, over one connection after the other
		cfg := config(r.start(t))
		cfg.Size, cfg.BlockSize = int64(len(image)), tt.blockSize
		index := w.connect(cfg)
		if tt.use != nil {
			tt.use(t, nbdnl.Path(index))
		}
		w.open(index, os.O_RDONLY).Close() // scans
		found, err := filepath.Glob(nbdnl.Path(index) + "p*")
		if err != nil || len(found) != tt.partitions {
			t.Errorf("blocks of %d bytes: partitions %v, want %d", tt.blockSize, found, tt.partitions)
		}
		if got := w.status(index).BlockSize; got != tt.blockSize {
			t.Errorf("block size is %d, want %d", got, tt.blockSize)
		}
		w.wantDetached(index, cfg.Identifier)
		<-r.done
	}
}

// partition makes a table with two partitions.
func partition(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("sfdisk", "--quiet", "--no-tell-kernel", path)
	cmd.Stdin = strings.NewReader("label: gpt\nsize=1MiB\nsize=1MiB\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
}

// What is wrong with a command is in the kernel's log, and nowhere else.
func TestKernelTrap30ReasonInLog(t *testing.T) {
	w, k := trapWorld(t)
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if _, err := log.Seek(0, 2); err != nil {
		t.Fatal(err)
	}
	index := w.idle()
	s, other := observe(t), observe(t)
	// FlagCanMultiConn is missing, which package nbdnl would not let pass.
	size, flags := number(nbdAttrSize, mebi), number(nbdAttrFlags, 1)
	_, err = k.command(nbdnltest.Connect, index, kernelEnds(s, other), size, flags)
	if !errors.Is(err, syscall.EINVAL) {
		t.Errorf("error is %v, want EINVAL", err)
	}
	wantLogged(t, log, filepath.Base(nbdnl.Path(index))+": server does not support multiple connections")

	// A datagram socket passes, and the error says where to look.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	f := os.NewFile(uintptr(fds[1]), "datagrams")
	defer f.Close()
	cfg := config()
	cfg.Sockets = []syscall.Conn{f}
	index, err = w.Connect(t.Context(), cfg)
	if !nbdnltest.StreamSockets.In(t) { // Linux 5.10 takes it, and the device would answer nothing.
		w.wantDone("connect", err)
		w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
		return
	}
	if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "the kernel log has the reason") {
		t.Errorf("error is %v, want EINVAL that points to the kernel's log", err)
	}
	wantLogged(t, log, "Unsupported socket")
}

// wantLogged reads the kernel's log up to what it has to say.
func wantLogged(t *testing.T, log *os.File, want string) {
	t.Helper()
	if err := log.SetReadDeadline(time.Now().Add(soon)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8<<10)
	for {
		n, err := log.Read(b) // one line
		if err != nil {
			t.Fatalf("nothing of %q in the kernel's log: %v", want, err)
		}
		if strings.Contains(string(b[:n]), want) {
			return
		}
	}
}
