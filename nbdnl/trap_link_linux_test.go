package nbdnl_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// Traps of a device's connections, and of what is sent over them.

// RECONFIGURE drops a socket for which no connection is dead, and reports success.
func TestKernelTrap07SocketDropped(t *testing.T) {
	w, k := trapWorld(t)
	l := k.listen()
	first := observe(t)
	cfg := witnessed(first)
	cfg.DeadConnTimeout = 30 * time.Second
	index := w.connect(cfg)
	dropped := observe(t)
	_, err := k.command(nbdnltest.Reconfigure, index, kernelEnds(dropped), identifier(cfg.Identifier))
	w.wantDone("reconfigure", err)
	dropped.kernel.Close()
	w.wantGone(dropped, "the kernel has dropped it")
	w.wantState(index, nbdnl.StateLive)

	// Once the kernel has noticed that the connection is dead, a socket takes its place.
	first.ours.Close()
	w.dead(l, index)
	next := observe(t)
	w.wantReconfigured(index, cfg.Identifier, nbdnl.Update{Sockets: kernelEnds(next)})
	next.kernel.Close()
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	w.wantDone("read", w.within("read", soon, w.read(f, elsewhere)))
	if n, _ := next.count(cmdRead); n == 0 {
		t.Error("the new connection has served nothing")
	}
	f.Close()
	w.wantDetached(index, cfg.Identifier)
	w.wantGone(next, "the device was detached")
}

// The announcement of a dead connection does not say which one it is, and gets lost where nobody
// has room for it. Whoever serves the connections sees for himself.
func TestKernelTrap08LinkDead(t *testing.T) {
	w, k := trapWorld(t)
	l, deaf := k.listen(), k.listen()
	if err := deaf.SetReadBuffer(1); err != nil { // the least that there is
		t.Fatal(err)
	}
	var witnesses []*witness
	for range 16 {
		witnesses = append(witnesses, observe(t))
	}
	cfg := witnessed(witnesses...)
	index := w.connect(cfg)
	for i, s := range witnesses[:8] {
		s.ours.Close()
		if attrs := w.dead(l, index); len(attrs) != 1 || attrs[0].Type != nbdAttrIndex {
			t.Errorf("attributes of announcement %d are %+v, want the index alone", i, attrs)
		}
	}
	if err := w.overflow(deaf); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("a small socket for announcements: %v, want ENOBUFS", err)
	}
	w.wantState(index, nbdnl.StateLive)
	w.wantDone("disconnect", w.Drop(t.Context(), index, cfg.Identifier))
	for _, s := range witnesses {
		w.wantGone(s, "the device was disconnected")
	}
}

// overflow hears announcements until there is an error.
func (w world) overflow(l listener) error {
	w.Helper()
	for {
		if err := l.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			w.Fatal(err)
		}
		if _, _, err := l.Receive(); err != nil {
			return err
		}
	}
}

// A new size waits for all requests in flight (Linux 6.12), while every other command waits as
// well; and the kernel looks at a message's size before its sockets, which alone could end the
// requests.
func TestKernelTrap10ResizeWaitsForRequests(t *testing.T) {
	w := kernelWorld(t)
	s := observe(t)
	s.holdAt(elsewhere)
	cfg := witnessed(s)
	cfg.Timeout = 2 * time.Second
	index := w.connect(cfg)
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	inFlight := w.read(f, elsewhere)
	w.keeps(s)
	size := int64(2 * mebi)
	err := w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size, Sockets: kernelEnds(observe(t))})
	if err == nil || errors.As(err, new(syscall.Errno)) {
		t.Errorf("size and sockets together: %v, want a refusal of this package", err)
	}
	wantStuck(w, "the read", 0, inFlight)

	begin := time.Now()
	w.wantDone("resize", w.Reconfigure(t.Context(), index, cfg.Identifier, nbdnl.Update{Size: &size}))
	if got := w.status(index).Size; got != size {
		t.Errorf("size is %d, want %d", got, size)
	}
	took := time.Since(begin)
	nbdnltest.WaitsForRequests.Seen(t, took > cfg.Timeout/2)
	if err := w.within("the read", soon, inFlight); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
}

// A CONNECT that fails has shut down the sockets that it was given, unless it failed because of
// EBUSY.
func TestKernelTrap17FailedConnectShutsSockets(t *testing.T) {
	w := kernelWorld(t)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	s := observe(t)
	cfg := witnessed(s)
	cfg.Flags |= nbdnl.FlagCanMultiConn
	cfg.Sockets = append(cfg.Sockets, null)
	index := w.idle()
	w.wantError(w.ConnectIndex(t.Context(), index, cfg), syscall.ENOTSOCK)
	w.wantGone(s, "the connect failed") // the kernel's end is still open here
	w.wantState(index, nbdnl.StateIdle)

	f := w.open(index, os.O_RDONLY)
	w.wantError(w.impatiently(nbdnl.ErrBusy, func(ctx context.Context) error {
		cfg = witnessed(observe(t))
		return w.ConnectIndex(ctx, index, cfg)
	}), nbdnl.ErrBusy)
	f.Close()
	w.connectIndex(index, cfg)
	w.wantDetached(index, cfg.Identifier)
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

// The kernel sends nothing over connections that it has no processor for, until they end.
func TestKernelTrap26MoreConnectionsThanProcessors(t *testing.T) {
	w := kernelWorld(t)
	processors := runtime.NumCPU()
	var witnesses []*witness
	for range processors + 2 {
		witnesses = append(witnesses, observe(t))
	}
	cfg := witnessed(witnesses...)
	index := w.connect(cfg)
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	for cpu := range processors {
		for range 8 {
			w.wantDone("read", w.within("read", soon, w.readOn(cpu, f)))
		}
	}
	f.Close()
	w.wantDetached(index, cfg.Identifier)
	for i, s := range witnesses {
		w.wantGone(s, "the device was detached")
		reads, _ := s.count(cmdRead)
		if idle := i >= processors; idle != (reads == 0) {
			t.Errorf("connection %d with %d processors has served %d reads", i, processors, reads)
		}
		if n, _ := s.count(cmdDisc); n != 1 {
			t.Errorf("connection %d got %d disconnects, want 1", i, n)
		}
	}
}

// readOn reads a block on one processor, and so over the connection that the kernel has for it.
func (w world) readOn(cpu int, f *os.File) <-chan error {
	w.Helper()
	p := aligned(w, block)
	return async(func() error {
		runtime.LockOSThread() // for good: the thread, with its affinity, ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return err
		}
		_, err := f.ReadAt(p, elsewhere)
		return err
	})
}

// Writes are as long as the queue's setting lets them be, and the length of a trim is no length of
// anything that is sent.
func TestKernelTrap27LongRequests(t *testing.T) {
	w := kernelWorld(t)
	s := observe(t)
	cfg := witnessed(s)
	cfg.Size = 8 << 30
	cfg.Flags |= nbdnl.FlagSendTrim
	cfg.Timeout = 30 * time.Second
	index := w.connect(cfg)
	usual := w.setting(index, "queue/max_sectors_kb")
	w.set(index, "queue/max_sectors_kb", w.setting(index, "queue/max_hw_sectors_kb"))
	defer w.set(index, "queue/max_sectors_kb", usual)
	f := w.open(index, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 32*mebi)
	_, err := f.WriteAt(p, 0)
	w.wantDone("write", err)
	if n, longest := s.count(cmdWrite); longest <= 4*mebi {
		t.Errorf("32 MiB came in %d writes, the longest of %d bytes: want one beyond every default", n, longest)
	}
	const cmdTrim = 4
	w.wantDone("discard", discard(f, 0, uint64(cfg.Size)))
	if n, longest := s.count(cmdTrim); n == 0 || longest < 2<<30 {
		t.Errorf("8 GiB were trimmed by %d requests, the longest of %d bytes: want some of GiB", n, longest)
	}
	w.wantDone("read", w.within("read", soon, w.read(f, 0))) // the server is still in step
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}

// Without FlagSendFlush the kernel takes each write for durable, and fsync says so. With it, and
// several connections, a flush comes over one of them.
func TestKernelTrap28Flush(t *testing.T) {
	w := kernelWorld(t)
	for _, tt := range []struct {
		flags     nbdnl.Flags
		witnesses int
		flushes   int
	}{{0, 1, 0}, {nbdnl.FlagSendFlush, 1, 1}, {nbdnl.FlagSendFlush, 2, 1}} {
		var witnesses []*witness
		for range tt.witnesses {
			witnesses = append(witnesses, observe(t))
		}
		cfg := witnessed(witnesses...)
		cfg.Flags = cfg.Flags&^nbdnl.FlagSendFlush | tt.flags
		index := w.connect(cfg)
		f := w.open(index, os.O_RDWR)
		_, err := f.WriteAt([]byte("data"), elsewhere)
		w.wantDone("write and fsync", errors.Join(err, f.Sync()))
		writes, flushes := 0, 0
		for _, s := range witnesses {
			n, _ := s.count(cmdWrite)
			writes += n
			n, _ = s.count(cmdFlush)
			flushes += n
		}
		if writes != 1 || flushes != tt.flushes {
			t.Errorf("flags %b, %d connections: %d writes and %d flushes, want 1 and %d",
				tt.flags, tt.witnesses, writes, flushes, tt.flushes)
		}
		f.Close()
		w.wantDetached(index, cfg.Identifier)
	}
}

// An index keeps the limits that its former user has set.
func TestKernelTrap29StickyLimits(t *testing.T) {
	w := kernelWorld(t)
	const file = "queue/max_sectors_kb"
	index := w.idle()
	cfg := witnessed(observe(t))
	w.connectIndex(index, cfg)
	usual := w.setting(index, file)
	w.set(index, file, "64")
	w.wantDetached(index, cfg.Identifier)

	cfg = witnessed(observe(t))
	w.connectIndex(index, cfg)
	w.wantSetting(index, file, "64", "the former user has set it")
	w.set(index, file, usual)
	w.wantSetting(index, file, usual, "it is set anew")
	w.wantDetached(index, cfg.Identifier)
}
