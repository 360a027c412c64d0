package memory

import (
	"fmt"
	"io"
	"io/fs"
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
	size   int64
	store  store
	closed atomic.Bool
}

// A store keeps the bytes of a Memory. Ranges are inside the device and not
// empty. It has to live with calls that come after close.
type store interface {
	readAt(p []byte, off int64) error
	readTo(w backends.Reply, off, n int64) error
	writeAt(p []byte, off int64) error
	writeFrom(r backends.Payload, off, n int64) error
	trim(off, n int64) error
	fill(off, n int64) error // zeros that occupy memory
	run(off, n int64) (length int64, used bool)
	used() int64
	close() error
}

// New makes a device of size bytes, at least 1, that reads as zeros. It takes no
// memory yet but the bookkeeping of Options.Limit.
func New(size int64, opts Options) (*Memory, error) {
	if size < 1 || size > maxSize {
		return nil, fmt.Errorf("memory: size %d: not in 1 to %d: %w", size, int64(maxSize), fs.ErrInvalid)
	}
	if opts.Limit < 0 {
		return nil, fmt.Errorf("memory: limit %d: negative: %w", opts.Limit, fs.ErrInvalid)
	}
	s, err := newStore(size, newBudget(opts.Limit))
	if err != nil {
		return nil, fmt.Errorf("memory: device of %d bytes: %w", size, err)
	}
	return &Memory{size: size, store: s}, nil
}

// Size returns the size in bytes.
func (m *Memory) Size() int64 { return m.size }

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
	if off < 0 || n < 0 || off > m.size-n {
		return fmt.Errorf("memory: %d bytes at %d are not inside the %d bytes of the device: %w", n, off, m.size, syscall.ENOSPC)
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
	if off >= 0 && int64(len(p)) > m.size-off {
		p, end = p[:max(m.size-off, 0)], io.EOF
		off = min(off, m.size)
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
	return failed("trim", off, n, m.store.trim(off, n))
}

// Zero implements backends.Zeroer. Without ZeroNoHole it is Trim; with it the
// range takes up memory, and the error is ENOSPC when there is not enough.
func (m *Memory) Zero(off, n int64, flags backends.ZeroFlags) error {
	if err := m.check(off, n); err != nil || n == 0 {
		return err
	}
	zero := m.store.trim
	if flags&backends.ZeroNoHole != 0 {
		zero = m.store.fill
	}
	return failed("zero", off, n, zero(off, n))
}

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
