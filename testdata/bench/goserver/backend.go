package main

import (
	"io"
	"syscall"
	"time"
)

type readerWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

// A plain backend has nothing of the fast path. Its memory is mapped, not Go's: a heap of that size
// would hide what the garbage collector costs.
type plain []byte

func newPlain(size int64) (plain, error) {
	const prot, flags = syscall.PROT_READ | syscall.PROT_WRITE, syscall.MAP_PRIVATE | syscall.MAP_ANONYMOUS
	return syscall.Mmap(-1, 0, int(size), prot, flags)
}

func (p plain) Size() int64 { return int64(len(p)) }

func (p plain) ReadAt(b []byte, off int64) (int, error) { return copy(b, p[off:]), nil }

func (p plain) WriteAt(b []byte, off int64) (int, error) { return copy(p[off:], b), nil }

// latency is what a slow backend takes for a request.
const latency = 200 * time.Microsecond

// A slow backend blocks for each request.
type slow struct {
	plain
	block func()
}

func (s slow) ReadAt(b []byte, off int64) (int, error) {
	s.block()
	return s.plain.ReadAt(b, off)
}

func (s slow) WriteAt(b []byte, off int64) (int, error) {
	s.block()
	return s.plain.WriteAt(b, off)
}

// sleep blocks a goroutine, as a network does.
func sleep() { time.Sleep(latency) }

// nanosleep blocks a thread, as a disk does.
func nanosleep() {
	t := syscall.NsecToTimespec(int64(latency))
	for syscall.Nanosleep(&t, &t) == syscall.EINTR {
	}
}
