package rawio

import (
	"crypto/tls"
	"fmt"
	"sync"
	"syscall"
)

// maxRecord is how many bytes a TLS record holds (RFC 8446, section 5.1).
const maxRecord = 16 << 10

// records are pieces of memory, each for the content of one record.
var records = sync.Pool{New: func() any { return new([maxRecord]byte) }}

// overTLS is a Conn over TLS. Each Write of a TLS connection becomes a record or several, with a
// header, a checksum and a system call for each, so what is sent is put together to as few as hold
// it. The copy is also what meets memory that is not there, instead of the cipher in the middle of
// a record.
type overTLS struct {
	portable
}

func newTLS(nc *tls.Conn) Conn { return &overTLS{portable{nc: nc}} }

// Recv never tells that there is nothing more to receive: the next record may be in memory.
func (c *overTLS) Recv(l Lender) (int, error) {
	l.Park()
	n, err := c.nc.Read(c.first[:])
	if n == 0 {
		return 0, err
	}
	return copy(l.Lend(), c.first[:n]), nil
}

func (c *overTLS) Send(v *Vec, more bool) (sent int, err error) {
	record := records.Get().(*[maxRecord]byte)
	defer func() {
		records.Put(record)
		if p := recover(); p != nil {
			f, ok := p.(interface{ Addr() uintptr })
			if !ok {
				panic(p)
			}
			err = fmt.Errorf("send: memory fault at address %#x: %w", f.Addr(), syscall.EFAULT)
		}
	}()
	filled := 0
	for _, p := range v.Bufs {
		for len(p) > 0 {
			n := copy(record[filled:], p)
			p = p[n:]
			if filled += n; filled == maxRecord {
				n, err := c.nc.Write(record[:])
				sent += n
				if err != nil {
					return sent, err
				}
				filled = 0
			}
		}
	}
	if filled > 0 {
		n, err := c.nc.Write(record[:filled])
		return sent + n, err
	}
	return sent, nil
}
