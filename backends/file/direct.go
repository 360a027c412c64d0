package file

import (
	"fmt"
	"reflect"
	"sync"
	"syscall"
)

// A direct knows how to read and write past the page cache; nil is the way through
// it. The device reaches into the caller's own memory then, which has to lie at an
// address that suits it. Where it does not, the bytes pass through memory of ours.
// There is a bound on that, and whoever comes beyond it waits, as for the disk.
type direct struct {
	unit   int64   // bytes, of which offsets and lengths are multiples; a power of two
	memory uintptr // bytes, of which addresses are multiples; a power of two

	lent chan struct{} // has an element for each bounce that is lent
	idle sync.Pool     // of *bounce
}

const (
	// bounceSize is the length of a bounce in bytes, longer than most requests.
	bounceSize = 128 << 10

	// maxBounces is how many may be lent for one file: more requests than most
	// disks work on at once.
	maxBounces = 64
)

// A bounce is memory that every device can use.
type bounce struct{ p []byte }

func newDirect(unit int64, memory uintptr) *direct {
	d := &direct{unit: unit, memory: memory, lent: make(chan struct{}, maxBounces)}
	d.idle.New = func() any { return &bounce{alignedMemory(max(bounceSize, int(unit)), memory)} }
	return d
}

func (d *direct) borrow() *bounce {
	d.lent <- struct{}{}
	return d.idle.Get().(*bounce)
}

func (d *direct) giveBack(b *bounce) {
	d.idle.Put(b)
	<-d.lent
}

// read has do read into p, or into other memory piece by piece.
func (d *direct) read(p []byte, off int64, do func(p []byte, off int64) (int, error)) (int, error) {
	return d.pass(p, off, do, false)
}

// write has do write p, or what is copied from it piece by piece.
func (d *direct) write(p []byte, off int64, do func(p []byte, off int64) (int, error)) (int, error) {
	return d.pass(p, off, do, true)
}

func (d *direct) pass(p []byte, off int64, do func(p []byte, off int64) (int, error), write bool) (int, error) {
	if d == nil {
		return do(p, off)
	}
	if err := d.check(off, len(p)); err != nil {
		return 0, err
	}
	if d.suits(p) {
		return do(p, off)
	}
	b := d.borrow()
	defer d.giveBack(b)
	for done := 0; ; {
		piece := b.p[:min(len(p)-done, len(b.p))]
		if write {
			copy(piece, p[done:])
		}
		n, err := do(piece, off+int64(done))
		if !write {
			copy(p[done:], piece[:n])
		}
		done += n
		if err != nil || done == len(p) {
			return done, err
		}
	}
}

// multiple returns the smallest multiple of unit and n.
func (d *direct) multiple(n int) int {
	n = max(n, 1)
	return n * (int(d.unit) / min(n&-n, int(d.unit)))
}

// check refuses what the kernel would refuse, but does not everywhere: what lies in
// a hole is not looked at by all of them.
func (d *direct) check(off int64, n int) error {
	if (off|int64(n))&(d.unit-1) != 0 {
		return fmt.Errorf("%d bytes at %d: direct I/O takes multiples of %d here: %w", n, off, d.unit, syscall.EINVAL)
	}
	return nil
}

// suits reports whether the device can reach into p.
func (d *direct) suits(p []byte) bool {
	return len(p) == 0 || addressOf(p)&(d.memory-1) == 0
}

// alignedMemory makes n bytes at an address that is a multiple of align.
func alignedMemory(n int, align uintptr) []byte {
	room := make([]byte, n+int(align))
	skip := int(-addressOf(room) & (align - 1))
	return room[skip:][:n:n]
}

// addressOf tells where p, which is not empty, lies. It stays there: Go does not move
// what is on its heap, where everything is that a system call gets through a func.
func addressOf(p []byte) uintptr {
	return reflect.ValueOf(&p[0]).Pointer()
}
