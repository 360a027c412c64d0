package nbdnl_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// A request is one that the kernel has sent.
type request struct {
	kind   uint16
	cookie uint64
	offset uint64
	length uint32
	first  byte // of the payload of a write
}

// A witness serves one connection, remembers what the kernel asks for, and keeps to itself the
// requests at one offset. What is written is forgotten, and reads are zeroes.
type witness struct {
	kernel, ours *net.UnixConn
	held         chan request
	gone         chan struct{} // closed when it has stopped to serve

	mu   sync.Mutex // guards what follows
	hold int64      // the offset, -1 for none
	seen []request
}

// observe starts a witness, which ends with the test at the latest.
func observe(t testing.TB) *witness {
	t.Helper()
	s := &witness{held: make(chan request, 128), gone: make(chan struct{}), hold: -1}
	s.kernel, s.ours = socketpair(t)
	go func() {
		defer close(s.gone)
		for s.serve() == nil {
		}
	}()
	t.Cleanup(func() {
		s.ours.Close()
		s.kernel.Close()
		<-s.gone
	})
	return s
}

// witnessed returns a configuration with the witnesses' connections, whose timeout is one that no
// machine is too slow for.
func witnessed(witnesses ...*witness) nbdnl.Config {
	cfg := config()
	cfg.Timeout = time.Minute
	for _, s := range witnesses {
		cfg.Sockets = append(cfg.Sockets, s.kernel)
	}
	if len(witnesses) > 1 {
		cfg.Flags |= nbdnl.FlagCanMultiConn
	}
	return cfg
}

func kernelEnds(witnesses ...*witness) []syscall.Conn { return witnessed(witnesses...).Sockets }

// holdAt makes the witness keep requests at that offset, -1 for none.
func (s *witness) holdAt(offset int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold = offset
}

// stopReading leaves what the kernel sends from now on in the socket.
func (s *witness) stopReading(t testing.TB) {
	t.Helper()
	if err := s.ours.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	<-s.gone
}

// count returns how many requests of a kind there were, and the length of the longest.
func (s *witness) count(kind uint16) (n int, longest uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.seen {
		if r.kind == kind {
			n++
			longest = max(longest, r.length)
		}
	}
	return n, longest
}

// serve takes one request.
func (s *witness) serve() error {
	var b [28]byte
	if _, err := io.ReadFull(s.ours, b[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(b[:]) != requestMagic {
		return errors.New("bad request magic")
	}
	r := request{
		kind:   binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}
	if r.kind == cmdWrite {
		var first [1]byte
		if _, err := io.ReadFull(s.ours, first[:]); err != nil {
			return err
		}
		r.first = first[0]
		if _, err := io.CopyN(io.Discard, s.ours, int64(r.length)-1); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.seen = append(s.seen, r)
	keep := s.hold >= 0 && r.offset == uint64(s.hold) && (r.kind == cmdRead || r.kind == cmdWrite)
	s.mu.Unlock()
	switch {
	case r.kind == cmdDisc:
		return io.EOF
	case keep:
		s.held <- r
		return nil
	}
	return s.reply(r, 0)
}

// reply answers a request.
func (s *witness) reply(r request, errno uint32) error {
	b := binary.BigEndian.AppendUint32(nil, replyMagic)
	b = binary.BigEndian.AppendUint32(b, errno)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	if r.kind == cmdRead && errno == 0 {
		b = append(b, make([]byte, r.length)...)
	}
	_, err := s.ours.Write(b)
	return err
}

// keeps waits for a request that the witness keeps.
func (w world) keeps(s *witness) request {
	w.Helper()
	select {
	case r := <-s.held:
		return r
	case <-time.After(soon):
		w.Fatal("the kernel sends no request")
		return request{}
	}
}

func (w world) wantGone(s *witness, why string) {
	w.Helper()
	select {
	case <-s.gone:
	case <-time.After(soon):
		w.Errorf("the server sees no end of its connection, although %s", why)
	}
}
