package file

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"github.com/nbdctl/nbdctl/backends"
)

// An ability is a system call that the file system or device may lack. The first
// refusal is remembered.
type ability struct{ missing atomic.Bool }

// try makes the call. An error matches errors.ErrUnsupported if the ability is
// missing.
func (a *ability) try(call func() error) error {
	if a.missing.Load() {
		return errors.ErrUnsupported
	}
	err := call()
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOTTY) {
		a.missing.Store(true)
		return errors.ErrUnsupported
	}
	return err
}

// Trim implements backends.Trimmer. In a regular file the range reads as zeros
// afterwards, unless the file system cannot make holes; on a block device that is
// up to the device.
func (f *File) Trim(off, n int64) error {
	if err := f.check(off, n); err != nil {
		return err
	}
	if sector := int64(f.sizes.Minimum); sector > 1 { // what is discarded is whole sectors
		end := (off + n) / sector * sector
		off = (off + sector - 1) / sector * sector
		n = end - off
	}
	if n <= 0 {
		return nil
	}
	var err error
	if f.block {
		err = f.discard.try(func() error { return f.discardRange(off, n) })
	} else {
		err = f.punch.try(func() error { return f.punchHole(off, n) })
	}
	if err != nil && !errors.Is(err, errors.ErrUnsupported) { // it was a hint
		return fmt.Errorf("file: %s: trim of %d bytes at %d: %w", f.path, n, off, err)
	}
	return nil
}

// Zero implements backends.Zeroer. Where holes and unwritten space are not to be
// had, or not for a range that is aligned like this, it writes zeros. A block
// device without an operation of its own has the kernel write them
// (blkdev_fallocate), so that it makes none but holes for ZeroFast.
func (f *File) Zero(off, n int64, flags backends.ZeroFlags) error {
	if err := f.check(off, n); err != nil || n == 0 {
		return err
	}
	err := errors.ErrUnsupported
	if flags&backends.ZeroNoHole == 0 {
		err = f.punch.try(func() error { return f.punchHole(off, n) })
	}
	fast := flags&backends.ZeroFast != 0
	if cannot(err) && !(fast && f.block) {
		err = f.zeroRange.try(func() error { return f.zeroExtent(off, n) })
	}
	if cannot(err) {
		if fast {
			return errors.ErrUnsupported
		}
		err = f.writeZeros(off, n)
	}
	if err != nil {
		return fmt.Errorf("file: %s: zeros for %d bytes at %d: %w", f.path, n, off, err)
	}
	return nil
}

// Cache implements backends.Cacher: the kernel begins to read what is not in its
// page cache. It is not offered with Options.Direct.
func (f *File) Cache(off, n int64) error {
	if err := f.check(off, n); err != nil || n == 0 {
		return err
	}
	if err := f.readAhead(off, n); err != nil && !cannot(err) {
		return fmt.Errorf("file: %s: read ahead %d bytes at %d: %w", f.path, n, off, err)
	}
	return nil
}

func cannot(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL)
}

func (f *File) writeZeros(off, n int64) error {
	zeros := make([]byte, min(n, 256<<10))
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := f.direct.write(p, off, f.f.WriteAt); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}
