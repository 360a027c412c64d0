//go:build !linux

package file

import (
	"errors"
	"os"

	"github.com/nbdctl/nbdctl/backends"
)

// The system calls that make a file backend more than reads and writes are
// Linux's. Elsewhere the portable ways do, or there is none.

func (f *File) sync() error { return f.f.Sync() }

func (f *File) writeDurably(p []byte, off int64) (int, error) { return 0, errors.ErrUnsupported }

func (f *File) findDirect() (*direct, error) {
	return nil, &DirectError{Path: f.path, Reason: "only on Linux there is a way"}
}

func (f *File) goDirect() error { return errors.ErrUnsupported }

func (f *File) punchHole(off, n int64) error { return errors.ErrUnsupported }

func (f *File) zeroExtent(off, n int64) error { return errors.ErrUnsupported }

func (f *File) readAhead(off, n int64) error { return errors.ErrUnsupported }

func (f *File) discardRange(off, n int64) error { return errors.ErrUnsupported }

func (f *File) canTrim() bool { return false }

func (f *File) sectorSizes() (backends.BlockSizes, error) { return backends.BlockSizes{}, nil }

func (f *File) checkWritable(size int64) error { return nil }

func whyProtected(f *os.File, block bool, err error) string { return err.Error() }

func sizeLimit() (int64, bool) { return 0, false }

func accessMode(f *os.File) (readOnly, direct bool, err error) { return false, false, nil }

// errNotCached says that a read would have to wait for the disk.
var errNotCached = errors.New("not in memory")

func readCached(fd int, p []byte, off int64) error { return errors.ErrUnsupported }

func cached(fd int, off int64, n int) bool { return false }

func openers(st os.FileInfo) []Holder { return nil }

// Extents implements backends.Extenter: all is content, as far as is known.
func (f *File) Extents(off, n int64, yield func(backends.Extent) bool) error {
	if err := f.check(off, n); err != nil {
		return err
	}
	if n > 0 {
		yield(backends.Extent{Offset: off, Length: n})
	}
	return nil
}
