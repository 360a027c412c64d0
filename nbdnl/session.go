package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
)

const (
	// endGrace is how long a server has for its answer to the announcement of the end, before its
	// connections are shut down, and endPatience how long the kernel has for what is left then.
	endGrace    = 2 * time.Second
	endPatience = 3 * time.Second
)

// A session keeps a device connected by ioctls: a thread that is in NBD_DO_IT for as long as the
// device lives. Nothing else runs in the thread, and it ends with the session: the kernel lets one
// thread only set up a device (nbd_add_socket), and any signal that reaches it in NBD_DO_IT, such
// as those by which the Go runtime preempts goroutines, ends the device (nbd_start_device_ioctl).
// So it takes none.
//
// What can't be kept from it are the end of the process and what stops it: SIGSTOP, Ctrl-Z in a
// terminal, a frozen control group, or a machine that is suspended. Each of them ends the device.
type session struct {
	driver *ioctlDriver
	index  int
	cfg    *Config // until begun

	// begun is closed before NBD_DO_IT. From then on dev, which is run's to close, and tid are set.
	begun chan struct{}
	dev   Device
	tid   int
	shown atomic.Bool // the kernel has shown the device

	done chan struct{} // closed when the thread has let go of everything
	err  error         // why it has not begun, or what NBD_DO_IT said; set before done is closed

	mu      sync.Mutex // guards sockets
	sockets []int      // copies, to shut down what keeps the kernel
}

// ownThread runs f in a thread that nothing else runs in, and that ends with f.
func ownThread(f func()) {
	runtime.LockOSThread() // for good: a thread whose goroutine ends so ends too
	if threadID() != os.Getpid() {
		f()
		return
	}
	// But for the first one of a process. While that is held here, it can't be the other's.
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(locked)
		f()
	}()
	<-locked
	runtime.UnlockOSThread()
}

// run is the session, in a thread of its own.
func (s *session) run() {
	defer close(s.done)
	defer s.driver.remove(s)
	defer s.closeSockets()
	if s.err = maskSignals(); s.err != nil {
		return
	}
	sys := s.driver.sys
	// Read-only, which the ioctls are content with: the end of a write would make udev probe the
	// device.
	if s.dev, s.err = sys.open(s.index, os.O_RDONLY); s.err != nil {
		s.err = fmt.Errorf("%w: %w", errUnopened, s.err)
		return
	}
	defer s.dev.Close() // with it goes the configuration, unless somebody else has the device open
	if s.err = s.setUp(); s.err != nil {
		return
	}
	s.tid = threadID()
	close(s.begun)
	s.err = sys.ioctl(s.dev, ioctlDoIt, 0)
	if errors.Is(s.err, syscall.EBUSY) && !s.started() {
		s.err = fmt.Errorf("%w: another program has connected it at the same moment", ErrBusy)
		return // the sockets to clear are that one's
	}
	// What is in flight would wait for as long as somebody has the device open.
	s.err = errors.Join(s.err, sys.clear(s.dev))
}

// setUp tells the kernel all but the beginning. The first socket claims the device.
func (s *session) setUp() error {
	sys, cfg := s.driver.sys, s.cfg
	requests, err := ioctlSizes(cfg.Size, cfg.blockSize())
	if err != nil {
		return err
	}
	own := holder.Descriptor{PID: os.Getpid(), FD: holder.AnyFD}
	holders, err := sys.Holders().Find(context.Background(), s.index, own)
	if err != nil {
		return err
	}
	// Whoever has it open may be about to connect it by ioctls, and would end what is begun here.
	if len(holders) > 0 || s.taken() {
		return errTaken
	}
	for i, fd := range s.sockets {
		err := sys.ioctl(s.dev, ioctlSetSock, uintptr(fd))
		if i == 0 && errors.Is(err, syscall.EINVAL) && s.taken() {
			return errTaken // by netlink
		}
		if err != nil {
			return err // EBUSY: another thread sets it up
		}
	}
	return sys.send(s.dev, append(requests,
		ioctlRequest{ioctlSetTimeout, uintptr(seconds(cfg.Timeout)), "timeout"},
		ioctlRequest{ioctlSetFlags, uintptr(cfg.Flags | FlagHasFlags), "flags"},
	))
}

// taken reports whether the device is connected.
func (s *session) taken() bool {
	use, err := s.driver.sysfs.Use(s.index)
	return err != nil || use.Connected
}

// started reports whether the device has been this session's. NBD_DO_IT says EBUSY, too, when a
// stop signal has ended the device, for the kernel then begins the call anew.
func (s *session) started() bool {
	use, err := s.driver.sysfs.Use(s.index)
	return s.shown.Load() || err == nil && use.TID != 0 && use.TID == s.tid
}

// wait returns when the kernel shows the device, or when it has come to nothing.
func (s *session) wait() error {
	select {
	case <-s.begun:
	case <-s.done:
		return s.err
	}
	w := s.driver.sys.watch(s.index)
	defer w.close()
	pause := backoff.New()
	defer pause.Stop()
	for {
		shows, err := s.shows()
		if shows || err != nil {
			s.shown.Store(shows)
			return err
		}
		select {
		case <-s.done:
			return s.ended()
		case <-pause.After():
		case <-w.changed:
			pause.Reset()
		}
	}
}

// shows reports whether the kernel shows the device as it will be: `pid` comes before the size.
func (s *session) shows() (bool, error) {
	use, err := s.driver.sysfs.Use(s.index)
	if err != nil || !use.Connected {
		return false, err
	}
	if use.TID != 0 && s.driver.sys.root().InitialPIDs() && use.TID != s.tid {
		return false, nil // another's, which NBD_DO_IT is about to say
	}
	size, err := s.driver.sysfs.Size(s.index)
	return size > 0, err
}

// ended returns why the device has ended before it was shown.
func (s *session) ended() error {
	if s.err != nil {
		return s.err
	}
	return errors.New("its connections ended at once")
}

// set changes the device.
func (s *session) set(u *Update) error {
	block, err := s.driver.sysfs.Number(s.index, "queue/logical_block_size")
	if err != nil {
		return err
	}
	if u.BlockSize != nil {
		block = uint64(*u.BlockSize)
	}
	var requests []ioctlRequest
	switch {
	case u.Size != nil:
		if requests, err = ioctlSizes(*u.Size, int(block)); err != nil {
			return err
		}
		if u.BlockSize == nil {
			requests = requests[1:]
		}
	case u.BlockSize != nil:
		requests = []ioctlRequest{{ioctlSetBlockSize, uintptr(block), "block size"}}
	}
	if u.Timeout != nil {
		requests = append(requests, ioctlRequest{ioctlSetTimeout, uintptr(seconds(*u.Timeout)), "timeout"})
	}
	err = s.driver.sys.send(s.dev, requests)
	if errors.Is(err, os.ErrClosed) {
		err = ErrNotConnected
	}
	return err
}

// disconnect ends the device, and returns when the thread has let go of it.
func (s *session) disconnect() error {
	select {
	case <-s.begun:
	case <-s.done:
		return nil
	}
	end := s.driver.sys.disconnect
	if s.hungUp() {
		end = s.driver.sys.clear // there is nobody to announce it to
	}
	err := end(s.dev)
	if err != nil && !errors.Is(err, os.ErrClosed) { // closed: by run, at the end
		return err
	}
	<-s.done
	return nil
}

// end is disconnect, and gets along with a server that does not read, to which the kernel may send
// for ever.
func (s *session) end() error {
	ended := make(chan error, 1)
	go func() { ended <- s.disconnect() }()
	timer := time.NewTimer(endGrace)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
	}
	s.shutDown()
	timer.Reset(endPatience)
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		return fmt.Errorf("%s: %w", name(s.index), errNoAnswer)
	}
}

// shutDown shuts down the connections.
func (s *session) shutDown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	shutDownAll(s.sockets)
}

// hungUp reports whether all connections have ended, and the device is about to.
func (s *session) hungUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return hungUp(s.sockets)
}

func (s *session) closeSockets() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.sockets)
	s.sockets = nil
}
