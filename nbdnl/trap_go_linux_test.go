package nbdnl_test

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// Traps of programs that are written in Go, and of what carries their commands.

// The descriptor of a connection is not the connection: asking an *os.File for it makes the
// connection block, and nothing keeps the garbage collector from closing it.
func TestKernelTrap18Descriptors(t *testing.T) {
	w := kernelWorld(t)
	kernel, ours := socketpair(t)
	defer ours.Close()
	f, err := kernel.File()
	if err != nil {
		t.Fatal(err)
	}
	kernel.Close()
	_ = f.Fd()
	if isNonblocking(t, f) {
		t.Error("Fd has left the connection as it was")
	}
	f.Close()

	for range 3 {
		kernel, ours := socketpair(t)
		collected := make(chan struct{})
		runtime.AddCleanup(kernel, func(c chan struct{}) { close(c) }, collected)
		r := &responder{ours: ours, gate: make(chan struct{}), done: make(chan struct{})}
		go func() {
			defer close(r.done)
			for r.answer() == nil {
			}
		}()
		cfg := config()
		cfg.Sockets = []syscall.Conn{kernel}
		id, nonblocking := cfg.Identifier, func() bool { return isNonblocking(t, cfg.Sockets[0]) }
		stop := collect()
		index, err := w.Connect(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if !nonblocking() {
			t.Error("the connection blocks after a connect")
		}
		cfg.Sockets, kernel = nil, nil // from here on nobody knows of it but the kernel
		select {
		case <-collected:
		case <-time.After(soon):
			t.Error("the connection was not collected")
		}
		stop()
		w.open(index, os.O_RDONLY).Close() // reads
		w.wantDetached(index, id)
		<-r.done
		ours.Close()
	}
}

// collect collects garbage all the time, until it is stopped.
func collect() (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			default:
				runtime.GC()
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}

func isNonblocking(t *testing.T, conn syscall.Conn) bool {
	t.Helper()
	flags, err := unix.FcntlInt(uintptr(descriptorOf(t, conn)), unix.F_GETFL, 0)
	if err != nil {
		t.Fatal(err)
	}
	return flags&unix.O_NONBLOCK != 0
}

// Any signal to the thread that is in NBD_DO_IT ends the device, and the Go runtime sends signals
// all the time. A device that was connected by netlink does not mind.
func TestKernelTrap19SignalsEndIoctlDevice(t *testing.T) {
	w := kernelWorld(t)
	index := w.idle()
	s := observe(t)
	done, tid := w.doIt(index, s)
	w.wantState(index, nbdnl.StateLive)
	mode := nbdnl.ModeIoctl
	if w.anonymous {
		mode = nbdnl.ModeUnknown
	}
	if got := w.status(index).Mode; got != mode {
		t.Errorf("mode is %v, want %v", got, mode)
	}
	tell(t, tid, unix.SIGURG) // what the runtime sends, which that thread does not take
	wantStuck(w, "the device", 300*time.Millisecond, done)
	tell(t, tid, unix.SIGUSR1)
	if err := w.within("the device", soon, done); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("NBD_DO_IT returned %v, want EBUSY: the signal ends it, and it can't be started anew", err)
	}
	w.wantState(index, nbdnl.StateIdle)

	cfg := witnessed(observe(t))
	index = w.connect(cfg)
	for _, task := range threads(t) {
		tell(t, task, unix.SIGURG)
	}
	f := w.open(index, os.O_RDONLY|syscall.O_DIRECT)
	w.wantDone("read", w.within("read", soon, w.read(f, elsewhere)))
	w.wantState(index, nbdnl.StateLive)
	f.Close()
	w.wantDetached(index, cfg.Identifier)
}

// doIt connects the device by ioctls (linux/nbd.h), in a thread that takes no signal but SIGUSR1.
// The channel gets what NBD_DO_IT returns.
func (w world) doIt(index int, s *witness) (<-chan error, int) {
	w.Helper()
	const (
		setSock       = 0xab00
		setBlockSize  = 0xab01
		doIt          = 0xab03
		setSizeBlocks = 0xab07
	)
	usr1 := make(chan os.Signal, 1) // takes the signal that would end the process
	signal.Notify(usr1, unix.SIGUSR1)
	w.Cleanup(func() { signal.Stop(usr1) })
	tid := make(chan int, 1)
	done := async(func() error {
		runtime.LockOSThread() // for good: the thread, with its signal mask, ends with the goroutine
		all := unix.Sigset_t{}
		for i := range all.Val {
			all.Val[i]--
		}
		all.Val[0] &^= 1 << (unix.SIGUSR1 - 1)
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil); err != nil {
			return err
		}
		fd, err := unix.Open(nbdnl.Path(index), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, c := range []struct{ request, arg int }{
			{setSock, descriptorOf(w, s.kernel)}, {setBlockSize, 512}, {setSizeBlocks, mebi / 512},
		} {
			if err := unix.IoctlSetInt(fd, uint(c.request), c.arg); err != nil {
				return err
			}
		}
		tid <- unix.Gettid()
		return unix.IoctlSetInt(fd, doIt, 0)
	})
	select {
	case id := <-tid:
		return done, id
	case err := <-done:
		w.Fatal(err)
		return nil, 0
	}
}

// tell sends a signal to a thread of this process, if it is still there.
func tell(t *testing.T, tid int, s syscall.Signal) {
	t.Helper()
	if err := unix.Tgkill(os.Getpid(), tid, s); err != nil && err != syscall.ESRCH {
		t.Error(err)
	}
}

func threads(t *testing.T) (tids []int) {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		tids = append(tids, tid)
	}
	return tids
}

// The owner that the kernel shows is a thread, which may have ended while its process lives. The
// identifier is what a device is known by.
func TestKernelTrap21OwnerIsThread(t *testing.T) {
	w, k := trapWorld(t)
	nbdnltest.Identifiers.Need(t) // and a driver whose owner can be asked for after that has gone
	index := w.idle()
	id := nbdnl.NewIdentifier("test")
	s := observe(t)
	tid := make(chan int, 1)
	var connect func() error
	connect = func() error {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			return <-async(connect) // the first thread never ends; held here, it is not the one
		}
		tid <- unix.Gettid()
		return k.connect(index, kernelEnds(s), number(nbdAttrSize, mebi), identifier(id))
	}
	w.wantDone("connect", w.within("connect", soon, async(connect)))
	owner := <-tid
	w.wantSetting(index, "pid", strconv.Itoa(owner), "it is the thread that has connected the device")
	for patience := time.Now().Add(soon); time.Now().Before(patience); <-time.After(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join("/proc/self/task", strconv.Itoa(owner))); err != nil {
			break
		}
	}
	st := w.status(index)
	if st.OwnerTID != owner || !st.OwnerGone || st.OwnerPID != 0 || st.Identifier != id {
		t.Errorf("status is %+v, want the owner %d, which has gone, and identifier %s", st, owner, id)
	}
	w.wantDetached(index, id)
}

// A command that is to be acknowledged has two answers, of which those who read one take the other
// for that to their next command.
func TestKernelTrap22AnswerAndAcknowledgement(t *testing.T) {
	w, k := trapWorld(t)
	conn, err := netlink.Dial(genericNetlink, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	index := w.idle()
	s := observe(t)
	header := []byte{byte(nbdnltest.Connect), 1, 0, 0} // genlmsghdr
	attrs := k.encode(index, kernelEnds(s), []attribute{number(nbdAttrSize, mebi)})
	sent, err := conn.Send(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(k.family.ID), Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(header, attrs...),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.disconnect(index) })
	for _, want := range []netlink.HeaderType{netlink.HeaderType(k.family.ID), netlink.Error} {
		if err := conn.SetReadDeadline(time.Now().Add(soon)); err != nil {
			t.Fatal(err)
		}
		got, err := conn.Receive()
		if err != nil || len(got) != 1 || got[0].Header.Type != want || got[0].Header.Sequence != sent.Header.Sequence {
			t.Errorf("messages %+v, error %v, want one of type %d", got, err, want)
		}
	}
	k.disconnect(index)

	// One Client, one command after the other: each gets its own answer.
	for range 10 {
		cfg := witnessed(observe(t))
		taken := w.connect(cfg)
		w.wantState(taken, nbdnl.StateLive)
		w.wantError(w.ConnectIndex(t.Context(), taken, witnessed(observe(t))), nbdnl.ErrBusy)
		w.wantError(w.Drop(t.Context(), taken, "test:other"), nbdnl.ErrNotOwner)
		w.wantDone("disconnect", w.Drop(t.Context(), taken, cfg.Identifier))
		w.wantState(taken, nbdnl.StateIdle)
	}
}
