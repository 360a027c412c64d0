package server_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// Numbers of the protocol document, written out again: a test that took them from the package would
// agree with any mistake.
const (
	cmdRead, cmdWrite, cmdDisc, cmdFlush, cmdTrim, cmdZero = 0, 1, 2, 3, 4, 6

	fua, noHole = 1, 2

	eperm, eio, einval, enospc = 1, 5, 22, 28
)

// A call is one request as a client makes it.
type call struct {
	op     uint16
	flags  uint16
	offset uint64
	length uint32 // of data, unless set
	data   []byte
}

// encode returns the request in wire format.
func (q call) encode(cookie uint64) []byte {
	if q.length == 0 {
		q.length = uint32(len(q.data))
	}
	b := make([]byte, 28, 28+len(q.data))
	binary.BigEndian.PutUint32(b, 0x25609513)
	binary.BigEndian.PutUint16(b[4:], q.flags)
	binary.BigEndian.PutUint16(b[6:], q.op)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint64(b[16:], q.offset)
	binary.BigEndian.PutUint32(b[24:], q.length)
	return append(b, q.data...)
}

// A reply is what a client gets.
type reply struct {
	errno  uint32
	cookie uint64
	data   []byte
}

// readReply reads one simple reply; want says how many bytes follow a success, by cookie.
func readReply(r io.Reader, want func(cookie uint64) int) (reply, error) {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return reply{}, err
	}
	if magic := binary.BigEndian.Uint32(b[:]); magic != 0x67446698 {
		return reply{}, fmt.Errorf("reply magic %#x", magic)
	}
	p := reply{errno: binary.BigEndian.Uint32(b[4:]), cookie: binary.BigEndian.Uint64(b[8:])}
	if p.errno == 0 {
		p.data = make([]byte, want(p.cookie))
		if _, err := io.ReadFull(r, p.data); err != nil {
			return reply{}, fmt.Errorf("data of a reply: %w", err)
		}
	}
	return p, nil
}

// A client has any number of requests in flight on one connection. Safe for concurrent use.
type client struct {
	t  testing.TB
	nc net.Conn

	// sending holds a value while a request is sent. Not a mutex: synctest takes who waits for that
	// for running.
	sending chan struct{}

	mu      sync.Mutex // guards all below
	cookie  uint64
	waiting map[uint64]waiter
	ended   error // why no more replies will come
}

type waiter struct {
	bytes int // that follow a success
	reply chan<- reply
}

func newClient(t testing.TB, nc net.Conn) *client {
	c := &client{t: t, nc: nc, cookie: 0x1122334455660000, waiting: make(map[uint64]waiter),
		sending: make(chan struct{}, 1)}
	go c.receive()
	return c
}

// receive hands out replies until the connection ends. It then closes the channels of those that
// still wait.
func (c *client) receive() {
	for {
		p, err := readReply(c.nc, func(cookie uint64) int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.waiting[cookie].bytes
		})
		c.mu.Lock()
		if err != nil {
			c.ended = err
			for _, w := range c.waiting {
				close(w.reply)
			}
			c.mu.Unlock()
			return
		}
		w, ok := c.waiting[p.cookie]
		delete(c.waiting, p.cookie)
		c.mu.Unlock()
		if !ok {
			c.t.Errorf("reply to a request that nobody made, cookie %#x", p.cookie)
			continue
		}
		w.reply <- p
	}
}

// start sends a request and returns the channel of its reply.
func (c *client) start(q call) <-chan reply {
	ch := make(chan reply, 1)
	w := waiter{reply: ch}
	if q.op == cmdRead {
		w.bytes = int(q.length)
	}
	c.mu.Lock()
	c.cookie++
	cookie := c.cookie
	if c.ended != nil {
		close(ch)
	} else {
		c.waiting[cookie] = w
	}
	c.mu.Unlock()

	c.sending <- struct{}{}
	defer func() { <-c.sending }()
	c.nc.Write(q.encode(cookie)) // An error ends the replies too.
	return ch
}

// do makes a request and waits for its reply.
func (c *client) do(q call) reply {
	c.t.Helper()
	p, ok := <-c.start(q)
	if !ok {
		c.t.Errorf("the connection ended without a reply to %+v", q)
	}
	return p
}

// expect makes a request and checks the error number of its reply.
func (c *client) expect(errno uint32, q call) []byte {
	c.t.Helper()
	p := c.do(q)
	if p.errno != errno {
		c.t.Errorf("op %d at %d: error %d, want %d", q.op, q.offset, p.errno, errno)
	}
	return p.data
}

// A session is a served connection with a client at its other end.
type session struct {
	*client
	conn *server.Conn
	err  chan error // takes what Transmit returns
}

// connect serves e over a pipe. Both ends are closed when the test ends.
func connect(t testing.TB, e *server.Export) *session {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close() })
	s := &session{client: newClient(t, ours), conn: e.NewConn(theirs, nil)}
	return s.run(t)
}

// connectSockets is connect over a pair of sockets.
func connectSockets(t testing.TB, e *server.Export) *session {
	ours, theirs := socketpair(t)
	s := &session{client: newClient(t, ours), conn: e.NewConn(theirs, nil)}
	return s.run(t)
}

func (s *session) run(t testing.TB) *session {
	s.err = make(chan error, 1)
	go func() { s.err <- s.conn.Transmit() }()
	t.Cleanup(func() { s.conn.Close() })
	return s
}

// disconnect says goodbye and checks that the server took it as one.
func (s *session) disconnect() {
	s.t.Helper()
	s.start(call{op: cmdDisc})
	if err := <-s.err; err != nil {
		s.t.Errorf("after NBD_CMD_DISC: %v", err)
	}
	s.nc.Close()
}

// export offers b, and fails the test if that is refused.
func export(t testing.TB, b backends.Backend, o server.Options) *server.Export {
	t.Helper()
	e, err := server.NewExport(b, o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
