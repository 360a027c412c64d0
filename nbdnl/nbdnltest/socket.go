package nbdnltest

import (
	"encoding/binary"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// familyID is the number that this kernel has given to the nbd family.
const familyID = 0x1f

// headerLength is that of struct nlmsghdr, in bytes.
const headerLength = 16

// groupID is the number of the family's multicast group.
const groupID = 0x0b

// A socket is a generic netlink socket. The kernel executes a command
// within Send, and leaves its reply for the next Receive.
type socket struct {
	kernel *Kernel
	wake   chan struct{} // has an element when something may have changed for a receiver
	closed chan struct{}
	once   sync.Once

	mu        sync.Mutex        // guards what follows
	datagrams []netlink.Message // one message each
	overrun   bool              // some were dropped
	deadline  time.Time
}

// Close wakes a receiver.
func (s *socket) Close() error {
	s.once.Do(func() {
		close(s.closed)
		s.kernel.mu.Lock()
		defer s.kernel.mu.Unlock()
		delete(s.kernel.group, s) // which it may not have joined
		s.kernel.sockets--
	})
	return nil
}

// JoinGroup makes the socket receive what the kernel sends to the group.
func (s *socket) JoinGroup(group uint32) error {
	if group != groupID {
		return syscall.EINVAL
	}
	s.kernel.mu.Lock()
	defer s.kernel.mu.Unlock()
	s.kernel.group[s] = true
	return nil
}

// multicast sends a message of the family to those who have joined its group; the kernel's mu is
// held.
func (k *Kernel) multicast(command uint8, attrs []byte) {
	g := genetlink.Message{Header: genetlink.Header{Command: command, Version: genlVersion}, Data: attrs}
	data, err := g.MarshalBinary()
	if err != nil {
		k.t.Errorf("fake kernel: message can't be encoded: %v", err)
	}
	for s := range k.group {
		s.deliver(netlink.Message{Header: netlink.Header{Type: familyID}, Data: data})
	}
}

// deliver queues a datagram of the kernel's own accord, or drops it where there is no room.
func (s *socket) deliver(m netlink.Message) {
	s.mu.Lock()
	if len(s.datagrams) < maxQueued {
		s.datagrams = append(s.datagrams, m)
	} else {
		s.overrun = true
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Send executes a command.
func (s *socket) Send(message []byte) error {
	var m netlink.Message
	if err := m.UnmarshalBinary(message); err != nil {
		return err
	}
	select {
	case <-s.closed:
		return syscall.EBADF
	default:
	}
	k := s.kernel
	k.count(m)
	k.genl <- struct{}{}
	replies := k.handle(m)
	<-k.genl
	s.mu.Lock()
	defer s.mu.Unlock()
	s.datagrams = append(s.datagrams, replies...)
	return nil
}

// count notes a command of the family.
func (k *Kernel) count(m netlink.Message) {
	if m.Header.Type != familyID || len(m.Data) == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts[Command(m.Data[0])]++ // genlmsghdr begins with the command
}

// Receive returns one datagram.
func (s *socket) Receive() ([]byte, error) {
	m, err := s.receive()
	if err != nil {
		return nil, err
	}
	// The length that an answer has from its request is not its own.
	m.Header.Length = uint32((headerLength + len(m.Data) + 3) &^ 3)
	return m.MarshalBinary()
}

func (s *socket) receive() (netlink.Message, error) {
	for {
		s.mu.Lock()
		if s.overrun {
			s.overrun = false
			s.mu.Unlock()
			return netlink.Message{}, syscall.ENOBUFS
		}
		if len(s.datagrams) > 0 {
			m := s.datagrams[0]
			s.datagrams = s.datagrams[1:]
			s.mu.Unlock()
			return m, nil
		}
		deadline := s.deadline
		s.mu.Unlock()
		var expired <-chan time.Time
		if !deadline.IsZero() {
			expired = time.After(time.Until(deadline))
		}
		select {
		case <-s.wake:
		case <-s.closed:
			return netlink.Message{}, os.ErrClosed
		case <-expired:
			return netlink.Message{}, os.ErrDeadlineExceeded
		}
	}
}

// SetReadDeadline bounds Receive.
func (s *socket) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// handle executes a message and returns the replies, each to be a datagram of its own: an
// acknowledgement comes after a reply, not in place of it.
func (k *Kernel) handle(m netlink.Message) []netlink.Message {
	var g genetlink.Message
	if err := g.UnmarshalBinary(m.Data); err != nil {
		return []netlink.Message{answer(m, syscall.EINVAL)}
	}
	var reply []byte
	var command uint8
	var errno syscall.Errno
	switch m.Header.Type {
	case genlIDCtrl:
		command = ctrlCmdNewFamily
		reply, errno = k.family(g)
	case familyID:
		command = g.Header.Command
		reply, errno = k.execute(Command(command), g.Data)
	default:
		errno = syscall.ENOENT
	}
	if errno != 0 {
		return []netlink.Message{answer(m, errno)}
	}
	if m.Header.Type == familyID && k.muted(Command(command)) {
		return nil
	}
	var replies []netlink.Message
	if reply != nil {
		g := genetlink.Message{Header: genetlink.Header{Command: command, Version: genlVersion}, Data: reply}
		data, err := g.MarshalBinary()
		if err != nil {
			k.t.Errorf("fake kernel: reply can't be encoded: %v", err)
		}
		h := m.Header
		h.Flags = 0
		replies = append(replies, netlink.Message{Header: h, Data: data})
	}
	if m.Header.Flags&netlink.Acknowledge != 0 {
		replies = append(replies, answer(m, 0))
	}
	return replies
}

// family answers what nlctrl is asked.
func (k *Kernel) family(g genetlink.Message) ([]byte, syscall.Errno) {
	if g.Header.Command != ctrlCmdGetFamily {
		return nil, syscall.EOPNOTSUPP
	}
	ad, err := netlink.NewAttributeDecoder(g.Data)
	if err != nil {
		return nil, syscall.EINVAL
	}
	for ad.Next() {
		if ad.Type() == ctrlAttrFamilyName && ad.String() == "nbd" && !k.options.NoModule && !k.options.HideFamily {
			ae := netlink.NewAttributeEncoder()
			ae.Uint16(ctrlAttrFamilyID, familyID)
			ae.String(ctrlAttrFamilyName, "nbd")
			ae.Uint32(ctrlAttrVersion, genlVersion)
			ae.Nested(ctrlAttrMcastGroups, func(list *netlink.AttributeEncoder) error {
				list.Nested(1, func(g *netlink.AttributeEncoder) error {
					g.String(ctrlAttrMcastGrpName, "nbd_mc_group")
					g.Uint32(ctrlAttrMcastGrpID, groupID)
					return nil
				})
				return nil
			})
			return k.encode(ae), 0
		}
	}
	return nil, syscall.ENOENT
}

// muted reports, once, whether the command is to lose its reply.
func (k *Kernel) muted(c Command) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mute[c] == 0 {
		return false
	}
	k.mute[c]--
	return true
}

// answer is NLMSG_ERROR: an error, or an acknowledgement with 0. It repeats the request's header.
func answer(m netlink.Message, errno syscall.Errno) netlink.Message {
	data := binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno)))
	data = binary.NativeEndian.AppendUint32(data, m.Header.Length)
	data = binary.NativeEndian.AppendUint16(data, uint16(m.Header.Type))
	data = binary.NativeEndian.AppendUint16(data, uint16(m.Header.Flags))
	data = binary.NativeEndian.AppendUint32(data, m.Header.Sequence)
	data = binary.NativeEndian.AppendUint32(data, m.Header.PID)
	h := m.Header
	h.Type, h.Flags = netlink.Error, 0
	return netlink.Message{Header: h, Data: data}
}
