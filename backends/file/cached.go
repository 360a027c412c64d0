package file

import (
	"github.com/nbdctl/nbdctl/backends"
)

// sendSize is the length in bytes from which on a read is sent from the page cache
// instead of being copied: up to 64 KiB, the copy costs less than the system calls
// that find out, take hold of the pages, and send them.
const sendSize = 64<<10 + 1

// ReadAtTo implements backends.ReaderAtTo for what the page cache has. Everything
// else waits for a disk, and would block.
func (f *File) ReadAtTo(w backends.Reply, off int64, n int) error {
	if err := f.check(off, int64(n)); err != nil || n == 0 {
		return err
	}
	q := f.queries.Get().(*query)
	defer f.queries.Put(q)
	if n >= sendSize && q.resident(off, n) && w.File(f.f, off, n) {
		return nil
	}
	p := w.Buffer(n)
	if p == nil || !q.read(p, off) {
		// Also when something is wrong with the file: ReadAt tells it better.
		return backends.ErrWouldBlock
	}
	return nil
}

// A query asks the page cache. Queries are pooled by their File, because what is
// passed to syscall.RawConn would be an allocation for each request.
type query struct {
	file *File
	try  func(fd uintptr) // made once

	p   []byte // to be filled; nil: to be counted
	off int64
	n   int
	ok  bool
}

func (f *File) newQuery() any {
	q := &query{file: f}
	q.try = q.ask
	return q
}

// read fills p if that needs no disk.
func (q *query) read(p []byte, off int64) bool {
	q.p, q.off, q.n = p, off, len(p)
	return q.run()
}

// resident reports whether n bytes at off are all in the page cache. They may not
// be any more when the answer is there.
func (q *query) resident(off int64, n int) bool {
	q.p, q.off, q.n = nil, off, n
	return q.run()
}

func (q *query) run() bool {
	q.ok = false
	closed := q.file.raw.Control(q.try)
	q.p = nil
	return q.ok && closed == nil
}

func (q *query) ask(fd uintptr) {
	if q.p != nil {
		q.ok = readCached(int(fd), q.p, q.off) == nil
	} else {
		q.ok = cached(int(fd), q.off, q.n)
	}
}

// canReadCached reports whether reads of f can leave the disk alone. Where they
// cannot, plain ones do better than refusing each of them.
func (f *File) canReadCached() (can bool) {
	err := f.raw.Control(func(fd uintptr) {
		err := readCached(int(fd), make([]byte, 1), 0)
		can = err == nil || err == errNotCached
	})
	return can && err == nil
}
