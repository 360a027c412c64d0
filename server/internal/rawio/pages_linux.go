//go:build (amd64 || arm64) && !race && !nbd_portable

package rawio

import (
	"errors"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxParts bounds the pipes for one message. With pipes of the default limit of the kernel that is
// 4 MiB.
const maxParts = 4

// errNoRoom says that the pages do not fit, or that there are no pipes for them.
var errNoRoom = errors.New("no room for the pages in pipes")

// spliceIn moves bytes of a file into a pipe; a variable for tests.
var spliceIn = func(fd int, off int64, pipe, n int) (int64, error) {
	// The flag is about the pipe. The page cache may have lost what was there a moment ago, and
	// then this reads the disk; so it is a call that the scheduler knows of.
	return syscall.Splice(fd, &off, pipe, nil, n, unix.SPLICE_F_NONBLOCK)
}

// Pages are bytes of a file, held by references to the page cache: they are there whatever becomes
// of the file. The zero value has none. Not safe for concurrent use.
//
// They lie in pipes, which is where splice(2) puts them, and where sendfile(2) does on its way, in
// one that belongs to the thread. But sendfile takes a part of the file after it has sent the one
// before, and a message is broken off if the file has fewer.
type Pages struct {
	parts [maxParts]part
	used  int // parts
	left  int // bytes that were not sent
}

// A part is what lies in one pipe.
type part struct {
	pipe *pipe
	left int // bytes
}

// Take takes n bytes of f from off on: all of them, or none and an error, which is
// io.ErrUnexpectedEOF if f has fewer. It reads what the page cache does not have. p must be empty.
// There are lengths that do not fit, and times when nothing does.
func (p *Pages) Take(f *os.File, off int64, n int) error {
	// Fd does not switch a regular file or block device to blocking mode, because these never were
	// in another.
	err := p.take(int(f.Fd()), off, n)
	runtime.KeepAlive(f)
	if err != nil {
		p.Drop()
	}
	return err
}

func (p *Pages) take(fd int, off int64, n int) error {
	for n > 0 {
		if p.used == maxParts {
			return errNoRoom
		}
		pipe := getPipe()
		if pipe == nil {
			return errNoRoom
		}
		part := &p.parts[p.used]
		part.pipe = pipe
		p.used++
		want := min(n, pipe.holds(off))
		for part.left < want {
			m, err := spliceIn(fd, off, pipe.w, want-part.left)
			switch {
			case err == syscall.EINTR:
			case err == syscall.EAGAIN: // The pipe is full: a page that came in two pieces takes two places.
				return errNoRoom
			case err != nil:
				return os.NewSyscallError("splice", err)
			case m == 0:
				return io.ErrUnexpectedEOF
			default:
				off += m
				part.left += int(m)
				p.left += int(m)
			}
		}
		n -= want
	}
	return nil
}

// Len returns how many bytes there are.
func (p *Pages) Len() int { return p.left }

// Drop gives up what there is.
func (p *Pages) Drop() {
	for i := range p.parts[:p.used] {
		part := &p.parts[i]
		if part.left == 0 {
			pipes.Put(part.pipe)
		} else {
			part.pipe.close()
		}
		part.pipe, part.left = nil, 0
	}
	p.used, p.left = 0, 0
}
