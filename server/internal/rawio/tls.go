package rawio

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
)

const (
	// maxRecord is how many bytes a TLS record holds (RFC 8446, section 5.1).
	maxRecord = 16 << 10
	// maxGathered is how many bytes of records are sent at once.
	maxGathered = 256 << 10
)

// records are pieces of memory, each for the content of one record.
var records = sync.Pool{New: func() any { return new([maxRecord]byte) }}

// gathered are pieces of memory for the records that are sent at once.
var gathered = sync.Pool{New: func() any { p := make([]byte, 0, maxGathered); return &p }}

// An Under is a connection for TLS to stand on. TLS makes a system call for each record. With an
// Under below it, a Conn receives what there is without waiting for more, and sends many records at
// once. To everybody else it is the connection that it was made of.
//
// What is gathered is sent as a socket sends. By the connection's own Write it takes 1.15 times the
// CPU time for writes of 128 KiB on one processor: the runtime's monitor takes the processor from a
// Write that has woken the client, and looks every 20 µs then whether there is another one.
type Under struct {
	net.Conn
	raw       syscall.RawConn // nil: it can't be asked what there is
	impatient bool            // Read does not wait
	try       func(fd uintptr) bool
	p         []byte // of try
	n         int
	err       error

	mu   sync.Mutex // guards the rest, and is held while it is sent: TLS may write when it reads
	out  *[]byte    // to be sent; nil: Write sends at once
	sock Conn       // what is gathered goes through it, of which the scheduler learns nothing
	vec  Vec        // of sock
}

// NewUnder prepares nc.
func NewUnder(nc net.Conn) *Under {
	u := &Under{Conn: nc, sock: New(nc)}
	switch nc := nc.(type) { // as in New: another type may well have a Read that does more
	case *net.UnixConn:
		u.raw, _ = nc.SyscallConn() // A closed one fails when it is read from.
	case *net.TCPConn:
		u.raw, _ = nc.SyscallConn()
	}
	if !asks {
		u.raw = nil
	}
	u.try = func(fd uintptr) bool {
		u.n, u.err = recv(fd, u.p)
		return true
	}
	return u
}

// notYet is the error of an impatient Read. It is temporary, which keeps TLS from taking it for the
// end of the connection.
type notYet struct{ error }

func (notYet) Timeout() bool   { return true }
func (notYet) Temporary() bool { return true }

var errNotYet net.Error = notYet{errors.New("nothing to receive yet")}

// Read implements net.Conn.
func (u *Under) Read(p []byte) (int, error) {
	if !u.impatient {
		return u.Conn.Read(p)
	}
	if u.raw == nil {
		return 0, errNotYet
	}
	u.p, u.n, u.err = p, 0, nil
	err := u.raw.Read(u.try)
	u.p = nil
	switch {
	case err != nil:
		return 0, err
	case u.err == syscall.EAGAIN:
		return 0, errNotYet
	}
	return u.n, u.err
}

// Write implements net.Conn.
func (u *Under) Write(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.out == nil {
		return u.Conn.Write(p)
	}
	if len(*u.out)+len(p) > maxGathered {
		if err := u.flush(); err != nil {
			return 0, err
		}
	}
	*u.out = append(*u.out, p...)
	return len(p), nil
}

// gather has Write wait for more.
func (u *Under) gather() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.out = gathered.Get().(*[]byte)
}

// send sends what was gathered.
func (u *Under) send() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	err := u.flush()
	gathered.Put(u.out)
	u.out = nil
	return err
}

// flush sends what was gathered so far. The caller holds mu.
func (u *Under) flush() error {
	p := *u.out
	*u.out = p[:0]
	if len(p) == 0 {
		return nil
	}
	u.vec.Add(p)
	defer u.vec.Truncate(0)
	_, err := u.sock.Send(&u.vec, false)
	return err
}

// overTLS is a Conn over TLS. Each Write of a TLS connection becomes a record or several, with a
// header, a checksum and a system call for each, so what is sent is put together to as few as hold
// it. The copy is also what meets memory that is not there, instead of the cipher in the middle of
// a record.
type overTLS struct {
	portable
	under *Under // nil: TLS stands on something else
}

func newTLS(nc *tls.Conn) Conn {
	under, _ := nc.NetConn().(*Under)
	return &overTLS{portable{nc: nc}, under}
}

// Recv receives the records that are there, or waits for one and those that come with it.
func (c *overTLS) Recv(l Lender) (int, error) {
	if c.asks() {
		n, err := c.there(l, l.Lend())
		if n == 0 && err == errNotYet && l.Yield(false) {
			yield()
			n, err = c.there(l, l.Lend())
		}
		if n > 0 || err != errNotYet {
			return n, err
		}
	}
	l.Park(false)
	n, err := c.nc.Read(c.first[:])
	if n == 0 {
		return 0, err
	}
	p := l.Lend()
	copy(p, c.first[:n])
	if c.asks() {
		m, _ := c.there(l, p[n:]) // An error comes again with the next call.
		n += m
	}
	return n, nil
}

// asks reports whether it can be told what is there.
func (c *overTLS) asks() bool { return c.under != nil && c.under.raw != nil }

// there receives what is there of what p has room for. Bytes come without an error, which comes
// again.
func (c *overTLS) there(l Lender, p []byte) (n int, err error) {
	c.under.impatient = true
	for n < len(p) && err == nil {
		var m int
		m, err = c.nc.Read(p[n:])
		n += m
	}
	c.under.impatient = false
	if err == errNotYet {
		l.Drained()
	}
	if n > 0 {
		err = nil
	}
	return n, err
}

// ReadFull gives the processor away once when there is nothing to receive: a client that shares it
// goes on to the end of its message, instead of being interrupted after each record.
//
// Memory of p that is not there is an error, as it is of a system call.
func (c *overTLS) ReadFull(p []byte, w Waiter) (n int, err error) {
	w.Wait()
	defer func() {
		if fault := memoryFault(recover()); fault != nil {
			err = fmt.Errorf("receive: %w", fault)
		}
	}()
	for n < len(p) && err == nil {
		var m int
		m, err = c.readSome(p[n:])
		n += m
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}

// readSome is Read of the connection.
func (c *overTLS) readSome(p []byte) (int, error) {
	if c.asks() {
		c.under.impatient = true
		defer func() { c.under.impatient = false }()
		n, err := c.nc.Read(p)
		if n == 0 && err == errNotYet {
			yield()
			n, err = c.nc.Read(p)
		}
		switch {
		case n > 0:
			return n, nil // An error comes again.
		case err != errNotYet:
			return 0, err
		}
		c.under.impatient = false
	}
	return c.nc.Read(p)
}

// memoryFault returns the error that a panic is, if it is one of memory that is not there
// (debug.SetPanicOnFault). It panics again with another one.
func memoryFault(p any) error {
	if p == nil {
		return nil
	}
	f, ok := p.(interface{ Addr() uintptr })
	if !ok {
		panic(p)
	}
	return fmt.Errorf("memory fault at address %#x: %w", f.Addr(), syscall.EFAULT)
}

func (c *overTLS) Send(v *Vec, more bool) (int, error) {
	if c.under == nil {
		return c.write(v)
	}
	c.under.gather()
	n, err := c.write(v)
	if sent := c.under.send(); sent != nil {
		return n, sent
	}
	return n, err
}

// write writes v in as few records as hold it.
func (c *overTLS) write(v *Vec) (written int, err error) {
	record := records.Get().(*[maxRecord]byte)
	defer func() {
		records.Put(record)
		if fault := memoryFault(recover()); fault != nil {
			err = fmt.Errorf("send: %w", fault)
		}
	}()
	filled := 0
	for _, p := range v.Bufs {
		for len(p) > 0 {
			n := copy(record[filled:], p)
			p = p[n:]
			if filled += n; filled == maxRecord {
				n, err := c.nc.Write(record[:])
				written += n
				if err != nil {
					return written, err
				}
				filled = 0
			}
		}
	}
	if filled > 0 {
		n, err := c.nc.Write(record[:filled])
		return written + n, err
	}
	return written, nil
}
