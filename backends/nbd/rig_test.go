package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A form is that of requests and replies.
type form int

const (
	simple form = iota
	structured
	extended
)

var forms = []form{simple, structured, extended}

func (f form) String() string { return [...]string{"simple", "structured", "extended"}[f] }

// request is one on the wire, without the data of a WRITE.
func request(f form, flags, command u16, cookie u64, off int64, n int64) []byte {
	if f == extended {
		return cat(magicExtRequest, flags, command, cookie, u64(off), u64(n))
	}
	return cat(magicRequest, flags, command, cookie, u64(off), u32(n))
}

// flags are those of a command: with extended headers, what has a payload says so by a flag.
func (r *rig) flags(command, flags u16) u16 {
	if r.form == extended && command == cmdWrite {
		return flags | 0x20
	}
	return flags
}

// A rig is a client, and the other end of its connection, where the test is the server.
type rig struct {
	t    testing.TB
	form form
	c    *nbd.Client
	nc   net.Conn // the server's end
}

// The contexts of a rig.
const (
	allocationID u32 = 7
	dirtyID      u32 = 0xfffffff0
	dirty            = "x:dirty"
	rigSize          = 1 << 40
)

// allFlags are all that change what a client does.
const allFlags = wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendTrim |
	wire.FlagSendWriteZeroes | wire.FlagSendCache | wire.FlagSendFastZero

// newRig makes a rig of a connection's ends, on whose agreement change may have a say.
func newRig(t testing.TB, f form, client, server net.Conn, o nbd.Options, change ...func(*nbd.Agreement)) *rig {
	t.Helper()
	s := &nbd.Session{NetConn: client, Agreement: nbd.Agreement{
		Info:       nbd.Info{Name: "disk", Size: rigSize, Flags: allFlags},
		Structured: f != simple, Extended: f == extended,
	}}
	if f != simple {
		s.Contexts = nbd.Contexts{
			{Name: "base:allocation", ID: uint32(allocationID)}, {Name: dirty, ID: uint32(dirtyID)},
		}
	}
	for _, do := range change {
		do(&s.Agreement)
	}
	c, err := s.Client(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close(); c.Close() })
	return &rig{t, f, c, server}
}

// bubble runs a test of one form with a rig on a pipe, in a bubble: a test in which everybody waits
// fails at once, and so does one that leaves a goroutine behind.
func bubble(t *testing.T, f form, test func(t *testing.T, r *rig), change ...func(*nbd.Agreement)) {
	t.Helper()
	bubbleWith(t, f, nbd.Options{}, test, change...)
}

func bubbleWith(t *testing.T, f form, o nbd.Options, test func(t *testing.T, r *rig), change ...func(*nbd.Agreement)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Helper()
		client, server := net.Pipe()
		test(t, newRig(t, f, client, server, o, change...))
	})
}

// each runs a test for each form, by its name.
func each(t *testing.T, some []form, test func(t *testing.T, r *rig), change ...func(*nbd.Agreement)) {
	t.Helper()
	for _, f := range some {
		t.Run(f.String(), func(t *testing.T) { bubble(t, f, test, change...) })
	}
}

// A query is a request that has arrived.
type query struct {
	flags, command u16
	cookie         u64
	offset, length int64
	data           []byte // of a WRITE
}

// next receives a request.
func (r *rig) next() query {
	r.t.Helper()
	q, err := r.receive()
	if err != nil {
		r.t.Fatalf("no request: %v", err)
	}
	return q
}

func (r *rig) receive() (query, error) {
	q, err := r.head()
	if err == nil && q.command == cmdWrite {
		q.data = make([]byte, q.length)
		_, err = io.ReadFull(r.nc, q.data)
	}
	return q, err
}

// head receives a request without the data of a WRITE.
func (r *rig) head() (query, error) {
	b := make([]byte, 28)
	magic := magicRequest
	if r.form == extended {
		b, magic = make([]byte, 32), magicExtRequest
	}
	if _, err := io.ReadFull(r.nc, b); err != nil {
		return query{}, err
	}
	if !bytes.HasPrefix(b, cat(magic)) {
		r.t.Errorf("a request begins with %x", b)
	}
	number := binary.BigEndian
	q := query{
		flags: u16(number.Uint16(b[4:])), command: u16(number.Uint16(b[6:])), cookie: u64(number.Uint64(b[8:])),
		offset: int64(number.Uint64(b[16:])),
	}
	if r.form == extended {
		q.length = int64(number.Uint64(b[24:]))
	} else {
		q.length = int64(number.Uint32(b[24:]))
	}
	return q, nil
}

// say sends replies. That the client hangs up meanwhile is seen by what it tells its caller.
func (r *rig) say(parts ...any) {
	if b := cat(parts...); len(b) > 0 {
		r.nc.Write(b)
	}
}

// simple is a simple reply.
func (q query) simple(errno u32, data ...any) []byte {
	return cat(magicSimple, errno, q.cookie, cat(data...))
}

// chunk is one of a reply in the form of the rig.
func (r *rig) chunk(q query, flags, kind u16, payload ...any) []byte {
	p := cat(payload...)
	return cat(r.header(q, flags, kind, u64(len(p))), p)
}

// header is that of a chunk.
func (r *rig) header(q query, flags, kind u16, length u64) []byte {
	if r.form == extended {
		return cat(magicExtended, flags, kind, q.cookie, u64(q.offset), length)
	}
	return cat(magicStructured, flags, kind, q.cookie, u32(length))
}

// ok is the reply to a request that has no data.
func (r *rig) ok(q query) []byte {
	if r.form == simple {
		return q.simple(0)
	}
	return r.chunk(q, done, chunkNone)
}

// filled is the reply to a READ.
func (r *rig) filled(q query, data []byte) []byte {
	if r.form == simple {
		return q.simple(0, data)
	}
	return r.chunk(q, done, chunkData, u64(q.offset), data)
}

// failed is a reply that tells of an error.
func (r *rig) failed(q query, errno u32, text string) []byte {
	if r.form == simple {
		return q.simple(errno)
	}
	return r.chunk(q, done, chunkError, errno, u16(len(text)), text)
}

// A result is what a caller gets.
type result struct {
	n   int
	err error
}

// read has a caller read.
func (r *rig) read(p []byte, off int64) <-chan result {
	return r.readContext(context.Background(), p, off)
}

// readContext has a caller read who can give up.
func (r *rig) readContext(ctx context.Context, p []byte, off int64) <-chan result {
	return r.call(func() (int, error) { return r.c.ReadAtContext(ctx, p, off) })
}

// write has a caller write.
func (r *rig) write(p []byte, off int64) <-chan result {
	return r.call(func() (int, error) { return r.c.WriteAt(p, off) })
}

// effect has a caller make a request without data.
func (r *rig) effect(f func() error) <-chan result {
	return r.call(func() (int, error) { return 0, f() })
}

func (r *rig) call(f func() (int, error)) <-chan result {
	is := make(chan result, 1)
	go func() {
		n, err := f()
		is <- result{n, err}
	}()
	return is
}

// works fails the test unless the connection is good for another request.
func (r *rig) works() {
	r.t.Helper()
	p := make([]byte, 512)
	is := r.read(p, 0)
	q := r.next()
	if q.command != cmdRead || q.offset != 0 || q.length != 512 {
		r.t.Errorf("instead of a read comes %+v", q)
	}
	want := pattern(0, 512)
	r.say(r.filled(q, want))
	if got := <-is; got.err != nil || !bytes.Equal(p, want) {
		r.t.Errorf("the connection does not work: %v, %s", got.err, firstDifference(p, want))
	}
}
