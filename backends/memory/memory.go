package memory

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/nbdctl/nbdctl/backends"
)

var _ interface {
	backends.Backend
	io.WriterAt
	backends.Trimmer
	backends.Zeroer
	backends.Extenter
	backends.Cacher
	backends.Resizer
	backends.ReaderAtTo
	backends.WriterAtFrom
} = (*Memory)(nil)

// chunkSize is the unit, in bytes, in which memory is taken and given back.
const chunkSize = 64 << 10

// maxSize keeps offsets, rounded up to anything, inside an int64.
const maxSize = 1 << 62

// Options of New. The zero value is ready to use.
type Options struct {
	// Limit is how many bytes of memory the device may use, bookkeeping
	// included: one byte for every 512 KiB of its size, and at least 64 KiB. A
	// write that needs more gets ENOSPC. Nobody asks whether the machine has as
	// much as the limit.
	//
	// 0 stands for what the machine, and the memory cgroups (version 2) of this
	// process, can spare at the time of the write without swapping, less a
	// sixteenth that is kept back. Any number of devices can be filled side by
	// side then. Where nobody can tell, there is no limit.
	Limit int64
}

// Memory is a sparse block device in memory. All methods may be called
// concurrently.
type Memory struct {
	size   atomic.Int64
	store  store
	closed atomic.Bool

	// end is held for writing while the end of the device moves, and for reading
	// where it counts: the last chunk may be short, and a trim up to the end takes
	// it as a whole, which must not hit what was written behind a former end.
	end sync.RWMutex
}

// A store keeps the bytes of a Memory. Ranges are inside the device and not
// empty. It has to live with calls that come after close.
type store interface {
	readAt(p []byte, off int64) error
	readTo(w backends.Reply, off, n int64) error
	writeAt(p []byte, off int64) error
	writeFrom(r backends.Payload, off, n int64) error
	trim(off, n int64, last bool) error // last: nothing comes behind the range
	fill(off, n int64) error            // zeros that occupy memory
	run(off, n int64) (length int64, used bool)
	used() int64
	grow(size int64) error // makes room for more; what was there stays in place
	close() error
	files() ([]*os.File, error)
	leave() error // close, and the content stays with who has the files
}

// New makes a device of size bytes, at least 1, that reads as zeros. It takes no
// memory yet but the bookkeeping of Options.Limit.
func New(size int64, opts Options) (*Memory, error) {
	if err := check(size, opts); err != nil {
		return nil, err
	}
	s, err := newStore(size, newLimit(opts.Limit))
	if err != nil {
		return nil, fmt.Errorf("memory: device of %d bytes: %w", size, err)
	}
	return newMemory(size, s), nil
}

func check(size int64, opts Options) error {
	if opts.Limit < 0 {
		return fmt.Errorf("memory: limit %d: negative: %w", opts.Limit, fs.ErrInvalid)
	}
	return checkSize(size)
}

func checkSize(size int64) error {
	if size < 1 || size > maxSize {
		return fmt.Errorf("memory: size %d: not in 1 to %d: %w", size, int64(maxSize), fs.ErrInvalid)
	}
	return nil
}

func newMemory(size int64, s store) *Memory {
	m := &Memory{store: s}
	m.size.Store(size)
	return m
}

// Size returns the size in bytes.
func (m *Memory) Size() int64 { return m.size.Load() }

// Used returns how many bytes of memory hold content now, in whole chunks of
// 64 KiB.
func (m *Memory) Used() int64 { return m.store.used() }

// Close gives all memory back. Later calls fail with fs.ErrClosed. What ReadAtTo
// has handed out stays readable, as zeros, for as long as the Memory is
// referenced; so let a server finish first.
func (m *Memory) Close() error {
	if m.closed.Swap(true) {
		return fs.ErrClosed
	}
	return m.store.close()
}

// check refuses calls after Close and ranges outside the device. For the store a
// range outside would be other memory.
func (m *Memory) check(off, n int64) error {
	if m.closed.Load() {
		return fs.ErrClosed
	}
	if size := m.size.Load(); off < 0 || n < 0 || off > size-n {
		return fmt.Errorf("memory: %d bytes at %d are not inside the %d bytes of the device: %w",
			n, off, size, syscall.ENOSPC)
	}
	return nil
}

// failed says what it was that did.
func failed(op string, off, n int64, err error) error {
	if err != nil {
		err = fmt.Errorf("memory: %s of %d bytes at %d: %w", op, n, off, err)
	}
	return err
}

// ReadAt implements io.ReaderAt.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	var end error
	if size := m.size.Load(); off >= 0 && int64(len(p)) > size-off {
		p, end = p[:max(size-off, 0)], io.EOF
		off = min(off, size)
	}
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) > 0 {
		if err := m.store.readAt(p, off); err != nil {
			return 0, failed("read", off, int64(len(p)), err)
		}
	}
	return len(p), end
}

// ReadAtTo implements backends.ReaderAtTo: content by reference, holes as zeros.
func (m *Memory) ReadAtTo(w backends.Reply, off int64, n int) error {
	if err := m.check(off, int64(n)); err != nil || n == 0 {
		return err
	}
	return m.store.readTo(w, off, int64(n))
}

// WriteAt implements io.WriterAt. Its error is ENOSPC when there is no memory to
// be had; then nothing was written.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	if err := m.store.writeAt(p, off); err != nil {
		return 0, failed("write", off, int64(len(p)), err)
	}
	return len(p), nil
}

// WriteAtFrom implements backends.WriterAtFrom for ranges that hold content
// already. The first write to a chunk has to ask the kernel for memory, which may
// wait until it has found some.
func (m *Memory) WriteAtFrom(r backends.Payload, off int64, n int) error {
	if err := m.check(off, int64(n)); err != nil || n == 0 {
		return err
	}
	return m.store.writeFrom(r, off, int64(n))
}

// Trim implements backends.Trimmer. The range reads as zeros afterwards. Memory
// is given back for the chunks, aligned pieces of 64 KiB, that are wholly inside.
func (m *Memory) Trim(off, n int64) error {
	if err := m.check(off, n); err != nil || n == 0 {
		return err
	}
	return failed("trim", off, n, m.trim(off, n))
}

func (m *Memory) trim(off, n int64) error {
	if off+n < m.size.Load() {
		return m.store.trim(off, n, false)
	}
	m.end.RLock()
	defer m.end.RUnlock()
	return m.store.trim(off, n, off+n == m.size.Load())
}

// Zero implements backends.Zeroer. Without ZeroNoHole it is Trim; with it the
// range takes up memory, and the error is ENOSPC when there is not enough. Both are
// quicker than a write (ZeroFast).
func (m *Memory) Zero(off, n int64, flags backends.ZeroFlags) error {
	if err := m.check(off, n); err != nil || n == 0 {
		return err
	}
	zero := m.trim
	if flags&backends.ZeroNoHole != 0 {
		zero = m.store.fill
	}
	return failed("zero", off, n, zero(off, n))
}

// Cache implements backends.Cacher. Everything is there.
func (m *Memory) Cache(off, n int64) error { return m.check(off, n) }

// Extents implements backends.Extenter.
func (m *Memory) Extents(off, n int64, yield func(backends.Extent) bool) error {
	if err := m.check(off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		length, used := m.store.run(off, end-off)
		if !yield(backends.Extent{Offset: off, Length: length, Hole: !used, Zero: !used}) {
			return nil
		}
		off += length
	}
	return nil
}

// Resize implements backends.Resizer. Memory of what is cut off is given back; the
// bookkeeping of the largest size stays. The error is ENOSPC when there is no
// memory for the bookkeeping.
func (m *Memory) Resize(size int64) error {
	if m.closed.Load() {
		return fs.ErrClosed
	}
	if err := checkSize(size); err != nil {
		return err
	}
	m.end.Lock()
	defer m.end.Unlock()
	old := m.size.Load()
	var err error
	if size < old {
		err = m.store.trim(size, old-size, true)
	} else {
		err = m.store.grow(size)
	}
	if err != nil {
		return fmt.Errorf("memory: resize from %d to %d bytes: %w", old, size, err)
	}
	m.size.Store(size)
	return nil
}
