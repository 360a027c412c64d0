package nbdnl

import (
	"io"
	"iter"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// A Socket takes the place of a generic netlink socket, in tests. Messages are as the kernel has
// them, with their headers (struct nlmsghdr, linux/netlink.h), and padded to four bytes. Receive
// may be called at the same time as the other methods.
type Socket interface {
	// Close also ends Receive.
	io.Closer
	// Send executes a command, and blocks for as long as the kernel does.
	Send(message []byte) error
	// Receive waits for a message. The error matches os.ErrDeadlineExceeded at the time that was
	// set, and syscall.ENOBUFS when messages were dropped.
	Receive() ([]byte, error)
	SetReadDeadline(t time.Time) error
	// JoinGroup has the socket receive what is sent to a multicast group.
	JoinGroup(group uint32) error
}

// dial opens a generic netlink connection.
func (s *System) dial() (*genetlink.Conn, error) {
	if s.Dial != nil {
		socket, err := s.Dial()
		if err != nil {
			return nil, err
		}
		return genetlink.NewConn(netlink.NewConn(substitute{socket}, uint32(os.Getpid()))), nil
	}
	conn, err := s.dialKernel()
	if err != nil {
		return nil, err
	}
	// The kernel says more of a refusal where it can; where it can't, that is no harm.
	_ = conn.SetOption(netlink.ExtendedAcknowledge, true)
	return conn, nil
}

// dialKernel opens a connection to the running kernel.
func (s *System) dialKernel() (*genetlink.Conn, error) {
	if s.NetNS == nil {
		return genetlink.Dial(nil)
	}
	raw, err := s.NetNS.SyscallConn()
	if err != nil {
		return nil, err
	}
	var conn *genetlink.Conn
	var dialErr error
	err = raw.Control(func(fd uintptr) {
		conn, dialErr = genetlink.Dial(&netlink.Config{NetNS: int(fd)})
	})
	if err != nil {
		return nil, err
	}
	return conn, dialErr
}

// A substitute is a Socket as package netlink wants one.
type substitute struct{ Socket }

func (s substitute) Send(m netlink.Message) error {
	b, err := m.MarshalBinary()
	if err != nil {
		return err
	}
	return s.Socket.Send(b)
}

func (s substitute) SendMessages(messages []netlink.Message) error {
	for _, m := range messages {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}

func (s substitute) Receive() ([]netlink.Message, error) {
	m, err := s.receive()
	return []netlink.Message{m}, err
}

func (s substitute) ReceiveIter() iter.Seq2[netlink.Message, error] {
	return func(yield func(netlink.Message, error) bool) { yield(s.receive()) }
}

func (s substitute) receive() (m netlink.Message, err error) {
	b, err := s.Socket.Receive()
	if err == nil {
		err = m.UnmarshalBinary(b)
	}
	return m, err
}

func (s substitute) SetDeadline(t time.Time) error { return s.SetReadDeadline(t) }

func (s substitute) SetWriteDeadline(time.Time) error { return nil }

func (s substitute) LeaveGroup(uint32) error { return nil } // Nobody leaves but by Close.
