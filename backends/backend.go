package backends

import "io"

// A Backend is a fixed range of bytes. It alone is a read-only device; the
// other interfaces of this package add to it.
//
// Size is the length in bytes, at least 0. It changes in Resize; it may also grow
// by itself where what is behind the backend does, and a server goes on with the
// size it knows until it is told.
type Backend interface {
	io.ReaderAt
	Size() int64
}

// A Syncer can make writes durable.
type Syncer interface {
	// Sync returns when every WriteAt, Trim and Zero that returned before it
	// was called is on stable storage. It may block for long. An error means
	// that some of them may be lost, and not only for this caller, so a backend
	// that cannot tell which goes on failing: a Sync that succeeds after one
	// that failed would promise what nobody checked.
	//
	// A backend without Sync promises that a write is as durable as it will
	// ever be when WriteAt returns, which is true of memory too.
	Sync() error
}

// A FUAWriter has a write that is durable when it returns ("force unit
// access"), cheaper than WriteAt followed by Sync, which is what a server does
// with a backend that has none.
type FUAWriter interface {
	// WriteAtFUA is WriteAt, and returns only when these bytes are on stable
	// storage. It says nothing of other writes.
	WriteAtFUA(p []byte, off int64) (int, error)
}

// A Trimmer takes the hint that a range is no longer needed.
type Trimmer interface {
	// Trim gives up the content of [off, off+n). The range may read as zeros or
	// as before, in any mixture, until it is written again; it never reads as
	// something that was not stored there. A backend that cannot give anything
	// back returns nil.
	Trim(off, n int64) error
}

// A Zeroer makes zeros without being sent them.
type Zeroer interface {
	// Zero makes [off, off+n) read as zeros. The range may be far larger than
	// any write; memory used for it is bounded. With an error that matches
	// errors.ErrUnsupported nothing has changed, and the caller writes zeros
	// instead.
	Zero(off, n int64, flags ZeroFlags) error
}

// ZeroFlags modify Zero.
type ZeroFlags uint32

const (
	// ZeroNoHole keeps the range allocated, so that later writes to it do not
	// run out of space (NBD_CMD_FLAG_NO_HOLE). Without it the backend is free
	// to make a hole, which is usually faster.
	ZeroNoHole ZeroFlags = 1 << iota
	// ZeroFast wants the zeros only where that is quicker than to write them
	// (NBD_CMD_FLAG_FAST_ZERO). Elsewhere Zero returns at once, with an error
	// that matches errors.ErrUnsupported, and the caller does not write zeros.
	ZeroFast
)

// A Cacher can fetch early what is far away.
type Cacher interface {
	// Cache hints that [off, off+n) is going to be read (NBD_CMD_CACHE). The
	// range may be as long as the backend; memory used for it is bounded. What
	// reads as what does not change. Cache may return before the range is there,
	// and returns nil where nothing can be fetched.
	Cache(off, n int64) error
}

// An Extenter knows where its data and its holes are.
type Extenter interface {
	// Extents calls yield for the pieces of [off, off+n) in ascending order,
	// without gaps, each at least one byte long and inside the range, until
	// yield returns false or the range is covered. The answer is a hint that
	// writes in flight may outdate, except that what it calls Zero did read as
	// zeros at some moment during the call.
	Extents(off, n int64, yield func(Extent) bool) error
}

// An Extent is a piece of a backend that is stored in one way.
type Extent struct {
	Offset int64 // in bytes from the start of the backend
	Length int64 // in bytes, at least 1
	Hole   bool  // a write may need space that is not there yet (NBD_STATE_HOLE)
	Zero   bool  // reads as zeros (NBD_STATE_ZERO)
}

// A Resizer can change its size.
type Resizer interface {
	// Resize sets the size in bytes, which Size tells from then on. What is added
	// reads as zeros; what is cut off is lost. After an error the size is as it
	// was, but what was to be cut off may be lost all the same.
	//
	// The caller keeps requests beyond the smaller of the two sizes away while it
	// runs, also those that were let in before: none of them is under way, and
	// nothing that ReadAtTo has handed out from there is still to be sent. Requests
	// below it go on meanwhile.
	Resize(size int64) error
}

// A BlockSizer has a say in how large requests are.
type BlockSizer interface {
	// BlockSizes does not change while the backend is in use.
	BlockSizes() BlockSizes
}

// BlockSizes are limits of one request in bytes; 0 stands for no opinion.
type BlockSizes struct {
	Minimum   int // offsets and lengths must be multiples; a power of two
	Preferred int // smaller ones cost a read-modify-write; a power of two, at least Minimum
	Maximum   int // longer reads and writes are refused; a multiple of Minimum
}
