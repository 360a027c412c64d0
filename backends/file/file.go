package file

import (
	"errors"
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
	backends.Syncer
	backends.FUAWriter
	backends.Trimmer
	backends.Zeroer
	backends.Extenter
	backends.Cacher
	backends.BlockSizer
	backends.Capper
	backends.Resizer
	backends.ReaderAtTo
} = (*File)(nil)

// Options of Open and New. The zero value attaches an existing file for writing.
type Options struct {
	// ReadOnly opens and locks for reading only. Without it, what can be read but not
	// written is refused, with a *ReadOnlyError: a block device that is read-only, a file
	// that is immutable or sealed, one on a file system that is read-only.
	ReadOnly bool

	// Create makes a sparse file of Size bytes if there is none. It never changes
	// an existing one. It is for Open, and excludes ReadOnly.
	Create bool

	// Size is the size in bytes that an existing file must have exactly; 0 takes
	// any.
	Size int64

	// BlockSize, in bytes, makes the device end at its last whole multiple: see
	// Tail. 0 stands for 1.
	BlockSize int

	// AllowEmpty takes a file without bytes, or without a whole block, as a device of
	// size 0, which a server can offer and a kernel cannot use. Otherwise it is an
	// error, a *SizeError.
	AllowEmpty bool

	// NoLock takes a regular file without a lock, on a file system that has none: that
	// nobody else writes it, or with ReadOnly unset reads it, is the caller's care then.
	// Otherwise that is an error, a *NoLocksError. A block device is opened exclusively
	// all the same.
	NoLock bool

	// Direct reads and writes past the page cache (O_DIRECT). BlockSizes then tells
	// the smallest request, of which the size of the device is a multiple too. It is
	// an error, a *DirectError, where that is not to be had.
	Direct bool
}

// maxBlockSize is more than any device has, and little enough for multiples to be numbers.
const maxBlockSize = 1 << 20

// File is a block device in a file. All methods may be called concurrently.
type File struct {
	f       *os.File
	raw     syscall.RawConn // of f
	path    string          // as it was given, for people
	created string          // absolute path, if Open made the file
	block   bool            // f is a block device
	unit    int64           // bytes, of which the size is a multiple
	size    atomic.Int64
	tail    atomic.Int64
	caps    backends.Caps
	sizes   backends.BlockSizes
	direct  *direct // nil: through the page cache

	durable   durable
	punch     ability
	zeroRange ability
	discard   ability

	queries sync.Pool // of *query

	measuring sync.Mutex // held while size and tail change
}

// New makes a device of an open file, which is to be a regular file or a block
// device, and locks it. It is read-only, and direct, if either the options or f say
// so. On success the File owns f; on failure f is the caller's still, if maybe locked.
//
// A block device should have been opened with O_EXCL: there is no way to do so
// afterwards.
func New(f *os.File, opts Options) (*File, error) {
	if opts.Create {
		return nil, fmt.Errorf("file: %s: an open file cannot be created: %w", f.Name(), fs.ErrInvalid)
	}
	if err := opts.check(f.Name()); err != nil {
		return nil, err
	}
	readOnly, direct, err := accessMode(f)
	if err != nil {
		return nil, err
	}
	opts.ReadOnly = opts.ReadOnly || readOnly
	opts.Direct = opts.Direct || direct
	file := &File{f: f, path: f.Name()}
	if err := file.setUp(opts); err != nil {
		return nil, err
	}
	return file, nil
}

func (o Options) check(path string) error {
	switch {
	case o.Size < 0:
		return fmt.Errorf("file: %s: size %d: negative: %w", path, o.Size, fs.ErrInvalid)
	case o.BlockSize < 0:
		return fmt.Errorf("file: %s: block size %d: negative: %w", path, o.BlockSize, fs.ErrInvalid)
	case o.BlockSize > maxBlockSize:
		return fmt.Errorf("file: %s: block size %d: more than %d: %w", path, o.BlockSize, maxBlockSize, fs.ErrInvalid)
	case o.Create && o.ReadOnly:
		return fmt.Errorf("file: %s: a file that is created cannot be read-only: %w", path, fs.ErrInvalid)
	}
	return nil
}

// setUp locks the file and finds out what it can do.
func (f *File) setUp(opts Options) error {
	st, err := f.f.Stat()
	if err != nil {
		return fmt.Errorf("file: %w", err)
	}
	if err := checkMode(f.path, st.Mode()); err != nil {
		return err
	}
	if f.raw, err = f.f.SyscallConn(); err != nil {
		return fmt.Errorf("file: %s: %w", f.path, err)
	}
	if f.block = isBlock(st.Mode()); f.block {
		if f.sizes, err = f.sectorSizes(); err != nil {
			return fmt.Errorf("file: %s: sector sizes: %w", f.path, err)
		}
	} else if !opts.NoLock {
		if err := f.lock(opts.ReadOnly); err != nil {
			return err
		}
	}
	if f.created != "" {
		if err := f.extend(opts.Size); err != nil {
			return err
		}
	}
	if opts.Direct {
		if f.direct, err = f.findDirect(); err != nil {
			return err
		}
		f.sizes.Minimum = max(f.sizes.Minimum, int(f.direct.unit))
		f.sizes.Preferred = max(f.sizes.Preferred, f.sizes.Minimum)
		opts.BlockSize = f.direct.multiple(opts.BlockSize)
	}
	if err := f.measure(opts); err != nil {
		return err
	}
	if !opts.ReadOnly {
		if err := f.checkWritable(f.size.Load()); err != nil {
			return err
		}
	}
	if f.direct != nil {
		if err := f.goDirect(); err != nil {
			return err
		}
	}
	f.caps = backends.CapExtents
	f.queries.New = f.newQuery
	if f.direct == nil {
		f.caps |= backends.CapCache
		if f.canReadCached() {
			f.caps |= backends.CapReadTo
		}
	}
	if !opts.ReadOnly {
		f.caps |= backends.CapWrite | backends.CapSync | backends.CapFUA | backends.CapZero
		if f.canTrim() {
			f.caps |= backends.CapTrim
		}
		if !f.block {
			f.caps |= backends.CapResize
		}
	}
	return nil
}

// BlockSizes returns the sector sizes of a block device. A regular file has no
// opinion, unless it is read and written past the page cache.
func (f *File) BlockSizes() backends.BlockSizes { return f.sizes }

// Caps says whether the device can be written and trimmed.
func (f *File) Caps() backends.Caps { return f.caps }

// Close unlocks the file and closes it. It does not sync.
func (f *File) Close() error { return f.f.Close() }

// Underlying returns the open file. It is for passing its descriptor to another process, which goes
// on with New: the lock goes along. It stays the File's.
func (f *File) Underlying() *os.File { return f.f }

// check refuses ranges outside of the device: past the end, a write would make
// the file grow.
func (f *File) check(off, n int64) error {
	if off < 0 || n < 0 || off > f.size.Load()-n {
		return fmt.Errorf("file: %s: %d bytes at %d are not inside the %d bytes of the device: %w",
			f.path, n, off, f.size.Load(), syscall.ENOSPC)
	}
	return nil
}

// ReadAt implements io.ReaderAt. A file that has become shorter than the device
// gives io.ErrUnexpectedEOF.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	var end error
	if size := f.size.Load(); off >= 0 && int64(len(p)) > size-off {
		p, end = p[:max(size-off, 0)], io.EOF
		off = min(off, size)
	}
	if err := f.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := f.direct.read(p, off, f.f.ReadAt)
	switch {
	case n == len(p):
		return n, end
	case errors.Is(err, io.EOF):
		return n, f.endedEarly(off, len(p))
	}
	return n, fmt.Errorf("file: %w", err)
}

// endedEarly is the error of a read that found the file to end in front of its last byte.
func (f *File) endedEarly(off int64, n int) error {
	found := ""
	switch length, err := f.length(); {
	case err != nil:
		found = fmt.Sprintf("it ended before (%v)", err)
	case length-off >= int64(n):
		found = fmt.Sprintf("it was cut off, and has %d bytes again", length)
	default:
		found = fmt.Sprintf("it has only %d bytes now", length)
	}
	return fmt.Errorf("file: %s: read of %d bytes at %d: %s: %w", f.path, n, off, found, io.ErrUnexpectedEOF)
}

// writePiece is the longest single write, in bytes, that may make pages in the page
// cache. Linux gives the data of one write the largest pages that it fits, and ext4
// goes through all blocks of a page for each later write to any of them: 4 KiB in a
// page of 1 MiB take five times as long as in one of 128 KiB.
const writePiece = 128 << 10

// WriteAt implements io.WriterAt.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	longest := writePiece
	if len(p) > writePiece && f.makesNoPages(off, len(p)) {
		longest = len(p)
	}
	done := 0
	for {
		piece := p[done:min(len(p), done+longest)]
		n, err := f.direct.write(piece, off+int64(done), f.f.WriteAt)
		done += n
		switch {
		case err != nil:
			return done, fmt.Errorf("file: %w", err)
		case done == len(p):
			return done, nil
		}
	}
}

// makesNoPages reports whether a write changes pages that are there, and then it is
// fastest in one piece: if somebody has made them large, each piece would go through
// all blocks of them. Or it is past the page cache.
func (f *File) makesNoPages(off int64, n int) bool {
	if f.direct != nil {
		return true
	}
	q := f.queries.Get().(*query)
	defer f.queries.Put(q)
	return q.resident(off, n)
}
