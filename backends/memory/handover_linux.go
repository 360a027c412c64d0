//go:build !(386 || arm || mips || mipsle)

package memory

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// files returns copies of both, that with the content first.
func (s *memfdStore) files() ([]*os.File, error) {
	var all []*os.File
	for _, f := range []*memfd{s.data, s.bits} {
		copied, err := f.duplicate()
		if err != nil {
			for _, f := range all {
				f.Close()
			}
			return nil, err
		}
		all = append(all, copied)
	}
	return all, nil
}

// leave closes the files. The memory is dropped with the last copy of them.
func (s *memfdStore) leave() error { return errors.Join(s.data.close(), s.bits.close()) }

func inheritStore(size int64, l *limit, files []*os.File) (store, error) {
	if len(files) != 2 {
		return nil, fmt.Errorf("%d files in place of 2", len(files))
	}
	s := &memfdStore{limit: l, maps: new(mappings)}
	runtime.AddCleanup(s, (*mappings).unmap, s.maps)
	var err error
	if s.data, err = openMemfd(files[0]); err != nil {
		return nil, err
	}
	if s.bits, err = openMemfd(files[1]); err != nil {
		return nil, err
	}
	return s, s.inherit(size)
}

// inherit makes the extent of what is there, which may be longer than the device.
func (s *memfdStore) inherit(size int64) error {
	data, err := s.data.Stat()
	if err != nil {
		return err
	}
	bitmap, err := s.bits.Stat()
	if err != nil {
		return err
	}
	e := &extent{chunks: data.Size() / chunkSize}
	if data.Size() < size || data.Size()%chunkSize != 0 || bitmap.Size() < e.overhead() {
		return fmt.Errorf("the files have %d and %d bytes, which is another device", data.Size(), bitmap.Size())
	}
	p, err := s.maps.add(s.bits, 0, e.overhead())
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	e.bits = bitmapIn(p)
	e.windows = make([]atomic.Pointer[window], (e.chunks-1)/windowChunks+1)
	s.extent.Store(e)
	used := int64(0)
	for i := range e.bits {
		used += int64(bits.OnesCount64(e.bits[i].Load()))
	}
	s.limit.give(-used*chunkSize - e.overhead())
	return nil
}

// openMemfd takes over a file of another process, if that can't be made shorter.
func openMemfd(f *os.File) (*memfd, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	m := &memfd{File: f, raw: raw}
	var seals int
	closed := raw.Control(func(fd uintptr) { seals, err = unix.FcntlInt(fd, unix.F_GET_SEALS, 0) })
	if err := errors.Join(closed, err); err != nil {
		return nil, fmt.Errorf("it is no memfd: %w", err)
	}
	if seals&unix.F_SEAL_SHRINK == 0 {
		return nil, errors.New("it can be made shorter")
	}
	return m, nil
}

// duplicate returns another descriptor of the file.
func (f *memfd) duplicate() (*os.File, error) {
	fd := -1
	var err error
	closed := f.raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(closed, err); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
