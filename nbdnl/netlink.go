package nbdnl

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// answerTimeout bounds the wait for a reply after the kernel has executed a command. The kernel
// queues the reply before sendmsg returns, so a wait means that it was dropped for want of memory.
const answerTimeout = 5 * time.Second

// lastLook bounds another wait, for a reply that is there.
const lastLook = 500 * time.Millisecond

// A netlinkDriver speaks the nbd family of generic netlink. Commands may run concurrently, each on
// a socket of its own.
type netlinkDriver struct {
	dial func() (*genetlink.Conn, error)

	mu     sync.Mutex       // guards what follows
	family genetlink.Family // the zero value until it is found
	// idle are the sockets that no command uses. They stay open until close: a kernel to come may
	// disconnect devices when the socket that connected them closes.
	idle   []*genetlink.Conn
	closed bool
}

// find looks up the family. Searches may run concurrently, each on a socket of its own.
func (d *netlinkDriver) find() error {
	conn, err := d.take()
	if err != nil {
		return err
	}
	err = d.lookup(conn)
	d.settle(conn, err)
	return err
}

func (d *netlinkDriver) found() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.family.ID != 0 // 0 is no family's: ids begin at GENL_MIN_ID
}

// lookup finds the family's id, which changes when the module is loaded anew.
func (d *netlinkDriver) lookup(conn *genetlink.Conn) error {
	family, err := conn.GetFamily(familyName)
	if errors.Is(err, os.ErrNotExist) {
		return ErrNoDriver
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.family = family
	return nil
}

func (d *netlinkDriver) mode() Mode { return ModeNetlink }

// serves is always false: what netlink has connected lives by itself.
func (d *netlinkDriver) serves(int) bool { return false }

func (d *netlinkDriver) connect(index int, cfg *Config, fds []int) (int, error) {
	attrs, err := encodeConnect(index, cfg, fds)
	if err != nil {
		return 0, err
	}
	// No Acknowledge: the kernel would send the reply and the acknowledgement, and whoever reads
	// one datagram per command is a message behind from then on.
	msgs, err := d.execute(cmdConnect, netlink.Request, attrs)
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		if m.Header.Command == cmdConnect {
			return decodeIndex(m.Data)
		}
	}
	return 0, errAnswerLost
}

func (d *netlinkDriver) disconnect(index int, still func() error) error {
	attrs, err := encodeIndex(index)
	if err == nil {
		err = still()
	}
	if err != nil {
		return err
	}
	_, err = d.execute(cmdDisconnect, netlink.Request|netlink.Acknowledge, attrs)
	return err
}

func (d *netlinkDriver) reconfigure(index int, identifier string, u *Update, fds []int) error {
	attrs, err := encodeReconfigure(index, identifier, u, fds)
	if err != nil {
		return err
	}
	_, err = d.execute(cmdReconfigure, netlink.Request|netlink.Acknowledge, attrs)
	return err
}

func (d *netlinkDriver) configured(index int) (bool, error) {
	attrs, err := encodeIndex(index)
	if err != nil {
		return false, err
	}
	msgs, err := d.execute(cmdStatus, netlink.Request, attrs)
	if err != nil {
		return false, err
	}
	for _, m := range msgs {
		devices, err := decodeStatus(m.Data)
		if err != nil {
			return false, err
		}
		for _, dev := range devices {
			if dev.index == index {
				return dev.configured, nil
			}
		}
	}
	return false, nil
}

func (d *netlinkDriver) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	var errs []error
	for _, conn := range d.idle {
		errs = append(errs, conn.Close())
	}
	d.idle = nil
	return errors.Join(errs...)
}

// execute runs one command on a socket that nobody else uses meanwhile. It blocks for as long as
// the kernel does.
func (d *netlinkDriver) execute(command uint8, flags netlink.HeaderFlags, attrs []byte) ([]genetlink.Message, error) {
	conn, err := d.take()
	if err != nil {
		return nil, err
	}
	req := genetlink.Message{
		Header: genetlink.Header{Command: command, Version: familyVersion},
		Data:   attrs,
	}
	msgs, err := d.transact(conn, req, flags)
	if errors.Is(err, syscall.ENOENT) {
		// No command of the family says ENOENT: it is generic netlink that does not know the id.
		if err = d.lookup(conn); err == nil {
			msgs, err = d.transact(conn, req, flags)
		}
	}
	d.settle(conn, err)
	return msgs, errnoOf(err)
}

// transact sends a request and returns the reply to it.
func (d *netlinkDriver) transact(
	conn *genetlink.Conn, m genetlink.Message, flags netlink.HeaderFlags,
) ([]genetlink.Message, error) {
	d.mu.Lock()
	family := d.family.ID
	d.mu.Unlock()
	// The kernel executes the command inside this call.
	req, err := conn.Send(m, family, flags)
	if err != nil {
		return nil, err
	}
	msgs, raw, err := receive(conn, answerTimeout)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The deadline has precedence over what is there. A process that was not running for so
		// long looks again.
		msgs, raw, err = receive(conn, lastLook)
	}
	if err == nil {
		err = netlink.Validate(req, raw)
	}
	if kernelError(err) || err == nil {
		return msgs, err
	}
	return nil, fmt.Errorf("%w: %w", errAnswerLost, err)
}

// receive waits for an answer.
func receive(conn *genetlink.Conn, limit time.Duration) ([]genetlink.Message, []netlink.Message, error) {
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return nil, nil, err
	}
	return conn.Receive()
}

// kernelError reports whether err is the kernel's own answer to a command.
func kernelError(err error) bool {
	var op *netlink.OpError
	return errors.As(err, &op) && op.Sequence != 0
}

// errnoOf returns the errno in the kernel's own answer, with the reason if the kernel gives one,
// and any other error as it is.
func errnoOf(err error) error {
	var op *netlink.OpError
	if !kernelError(err) || !errors.As(err, &op) {
		return err
	}
	if op.Message != "" {
		return fmt.Errorf("%w (%s)", op.Err, op.Message)
	}
	return op.Err
}

// take returns a socket for the use of one command.
func (d *netlinkDriver) take() (*genetlink.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, os.ErrClosed
	}
	if n := len(d.idle); n > 0 {
		conn := d.idle[n-1]
		d.idle = d.idle[:n-1]
		return conn, nil
	}
	return d.dial()
}

// settle keeps a socket for the next command, unless the last one, which ended with err, may have
// left a reply in it.
func (d *netlinkDriver) settle(conn *genetlink.Conn, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	inStep := err == nil || errors.Is(err, ErrNoDriver) || kernelError(err)
	if inStep && !d.closed {
		d.idle = append(d.idle, conn)
		return
	}
	_ = conn.Close() // there is nothing left to lose in it
}
