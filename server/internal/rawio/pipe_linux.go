//go:build (amd64 || arm64) && !race && !nbd_portable

package rawio

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize, in bytes, is what a process may have without privilege by default
	// (fs.pipe-max-size).
	pipeSize = 1 << 20
	// minPipe, in pages, is what a pipe has by default. The kernel gives less to a user who has
	// many (fs.pipe-user-pages-soft).
	minPipe = 16
	// pipeRest is how long no pipe is asked for after there was none to be had.
	pipeRest = time.Second
)

var (
	// pipes are those in no use, all of them empty. The garbage collector closes what a peak left
	// behind.
	pipes sync.Pool
	// pipeCount is how many there are, used or not.
	pipeCount atomic.Int64
	// noPipe is when none could be made last, by the clock of the system in nanoseconds.
	noPipe atomic.Int64
)

// maxPipes bounds the pipes of the process, and so the descriptors. A pipe is in use while a
// message is sent, and longer than that takes only if its receiver is slow, who then keeps it from
// others; they do without.
func maxPipes() int64 { return int64(max(16, 4*runtime.GOMAXPROCS(0))) }

// A pipe holds references to pages, one page at most in each of its places.
type pipe struct {
	r, w    int // descriptors
	places  int
	cleanup runtime.Cleanup
}

// getPipe returns an empty pipe, or nil.
func getPipe() *pipe {
	if p, ok := pipes.Get().(*pipe); ok {
		return p
	}
	if pipeCount.Add(1) > maxPipes() {
		pipeCount.Add(-1)
		return nil
	}
	p, err := newPipe()
	if err != nil {
		pipeCount.Add(-1)
		return nil
	}
	return p
}

func newPipe() (*pipe, error) {
	now := time.Now().UnixNano()
	if then := noPipe.Load(); then != 0 && now-then < int64(pipeRest) {
		return nil, errNoRoom
	}
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
		noPipe.Store(now)
		return nil, os.NewSyscallError("pipe2", err)
	}
	p := &pipe{r: fds[0], w: fds[1], places: widenPipe(fds[1]) / os.Getpagesize()}
	if p.places < minPipe {
		noPipe.Store(now)
		closePipe(fds)
		return nil, errNoRoom
	}
	p.cleanup = runtime.AddCleanup(p, forgetPipe, fds)
	return p, nil
}

// widenPipe gives a pipe as much of pipeSize as it may have, and returns how many bytes that are.
func widenPipe(fd int) int {
	for size := pipeSize; ; size /= 2 {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, size)
		if err == nil {
			return n
		}
		if size <= minPipe*os.Getpagesize() {
			break
		}
	}
	n, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		return 0
	}
	return n
}

// holds returns how many bytes of a file from off on fit the empty pipe.
func (p *pipe) holds(off int64) int {
	size := int64(os.Getpagesize())
	return int(int64(p.places)*size - off%size)
}

// close is for a pipe that is not empty, and so of no more use.
func (p *pipe) close() {
	p.cleanup.Stop()
	forgetPipe([2]int{p.r, p.w})
}

func forgetPipe(fds [2]int) {
	closePipe(fds)
	pipeCount.Add(-1)
}

func closePipe(fds [2]int) {
	_ = syscall.Close(fds[0])
	_ = syscall.Close(fds[1])
}
