package nbdnl_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"golang.org/x/sys/unix"
)

// The tests TestKernelTrap01 to TestKernelTrap30 each provoke one thing that the kernel's driver
// does and that its users have fallen over, so that a kernel that behaves otherwise is noticed, and
// show how this package fares. Missing are:
//
//   - 20, I/O with O_DIRECT by a Go program breaks the connection: only on kernels after 6.1 and
//     before 7.2, where a signal interrupts the sending of a request. That the device gets a large
//     send buffer and no scheduler there is in package blockdev.
//   - 24, a server that needs memory which the kernel wants to free by writing to its device: needs
//     a machine without memory, which takes hours to fall into the trap or falls over for other
//     reasons.
//   - 25, the serving process maps its own device: what is feared is that this very process, and so
//     the test, hangs for good; it is a rule for programs.
//
// Three are shown in part: of 8, that another network namespace hears nothing needs Linux 6.12,
// where such a namespace can use the family at all; of 10, that the resize waits at all needs Linux
// 6.12, and the deadlock that follows is refused by this package; of 14, Linux 5.10 would hang
// every generic netlink user of the machine.
//
// Two traps more have tests elsewhere: 31, a reconfigure that was obeyed is undone by the receiver
// of the connection before (TestKernelReconfigureTimedOut), and 32, some receivers never start
// (TestKernelReceivers).

// The control interface once more, to give commands that package nbdnl would not.
const (
	genericNetlink = 16 // NETLINK_GENERIC, linux/netlink.h

	nbdAttrIndex      = 1
	nbdAttrSize       = 2
	nbdAttrBlockSize  = 3
	nbdAttrTimeout    = 4
	nbdAttrFlags      = 5
	nbdAttrSockets    = 7
	nbdAttrIdentifier = 10

	nbdCmdLinkDead = 4
)

// A rawKernel takes commands as they are.
type rawKernel struct {
	*testing.T
	conn   *genetlink.Conn
	family genetlink.Family
}

func newRawKernel(t *testing.T) rawKernel {
	t.Helper()
	conn, err := genetlink.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	family, err := conn.GetFamily("nbd")
	if err != nil {
		t.Fatal(err)
	}
	return rawKernel{t, conn, family}
}

// trapWorld is the real kernel, by way of this package and past it.
func trapWorld(t *testing.T) (world, rawKernel) {
	t.Helper()
	w := kernelWorld(t)
	return w, newRawKernel(t)
}

// An attribute is one of a command.
type attribute func(*netlink.AttributeEncoder)

func number(kind uint16, v uint64) attribute {
	return func(ae *netlink.AttributeEncoder) { ae.Uint64(kind, v) }
}

func identifier(id string) attribute {
	return func(ae *netlink.AttributeEncoder) { ae.String(nbdAttrIdentifier, id) }
}

// encode returns the attributes with the index first, unless that is -1, and the sockets last.
func (k rawKernel) encode(index int, socks []syscall.Conn, attrs []attribute) (data []byte) {
	k.Helper()
	ae := netlink.NewAttributeEncoder()
	if index >= 0 {
		ae.Uint32(nbdAttrIndex, uint32(index))
	}
	for _, a := range attrs {
		a(ae)
	}
	if len(socks) > 0 {
		ae.Nested(nbdAttrSockets, func(list *netlink.AttributeEncoder) error {
			for _, s := range socks {
				list.Nested(1, func(item *netlink.AttributeEncoder) error {
					item.Uint32(1, uint32(descriptorOf(k, s)))
					return nil
				})
			}
			return nil
		})
	}
	data, err := ae.Encode()
	if err != nil {
		k.Fatal(err)
	}
	return data
}

// command gives a command and returns the kernel's answer to it.
func (k rawKernel) command(
	c nbdnltest.Command, index int, socks []syscall.Conn, attrs ...attribute,
) ([]genetlink.Message, error) {
	k.Helper()
	m := genetlink.Message{Header: genetlink.Header{Command: uint8(c), Version: 1}, Data: k.encode(index, socks, attrs)}
	flags := netlink.Request
	if c == nbdnltest.Disconnect || c == nbdnltest.Reconfigure {
		flags |= netlink.Acknowledge // the only answer that they have
	}
	return k.conn.Execute(m, k.family.ID, flags)
}

// connect connects the device, which is disconnected with the test at the latest.
func (k rawKernel) connect(index int, socks []syscall.Conn, attrs ...attribute) error {
	k.Helper()
	_, err := k.command(nbdnltest.Connect, index, socks, attrs...)
	if err == nil {
		k.Cleanup(func() { k.disconnect(index) })
	}
	return err
}

// disconnect disconnects the device, whosever it is. That it is not connected is no error.
func (k rawKernel) disconnect(index int) {
	k.Helper()
	if _, err := k.command(nbdnltest.Disconnect, index, nil); err != nil {
		k.Errorf("bare disconnect of nbd%d: %v", index, err)
	}
}

// descriptorOf returns a connection's descriptor, which is valid while the connection is open.
func descriptorOf(t testing.TB, conn syscall.Conn) (fd int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(n uintptr) { fd = int(n) }); err != nil {
		t.Fatal(err)
	}
	return fd
}

// idle returns an index that nobody uses.
func (w world) idle() int {
	w.Helper()
	devices, err := w.Devices(w.Context())
	if err != nil {
		w.Fatal(err)
	}
	for i := len(devices) - 1; i >= 0; i-- {
		if devices[i].State == nbdnl.StateIdle && devices[i].Index < 16 {
			return devices[i].Index
		}
	}
	w.Fatal("no device is idle")
	return 0
}

// connectIndex connects the device, which is disconnected with the test at the latest.
func (w world) connectIndex(index int, cfg nbdnl.Config) {
	w.Helper()
	if err := w.ConnectIndex(w.Context(), index, cfg); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = w.Drop(context.Background(), index, cfg.Identifier) })
}

// setting reads a file of the device's directory in sysfs.
func (w world) setting(index int, file string) string {
	w.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(nbdnl.Path(index)), file))
	if err != nil {
		w.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// set writes a file of the device's directory in sysfs.
func (w world) set(index int, file, value string) {
	w.Helper()
	path := filepath.Join("/sys/block", filepath.Base(nbdnl.Path(index)), file)
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		w.Error(err)
	}
}

func (w world) wantSetting(index int, file, want, why string) {
	w.Helper()
	if got := w.setting(index, file); got != want {
		w.Errorf("%s of nbd%d is %s, want %s: %s", file, index, got, want, why)
	}
}

// open opens the device, which is closed with the test at the latest.
func (w world) open(index, flag int) *os.File {
	w.Helper()
	f, err := os.OpenFile(nbdnl.Path(index), flag, 0)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { f.Close() })
	return f
}

// block is what one read or write of these tests moves, in bytes.
const block = 4096

// aligned returns memory for n bytes of I/O past the page cache.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(p) })
	return p
}

// async runs one I/O, which may be stuck in the kernel for long. The test must get it to end.
func async(io func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- io() }()
	return done
}

// read reads a block past the page cache, without waiting for it.
func (w world) read(f *os.File, offset int64) <-chan error {
	w.Helper()
	p := aligned(w, block)
	return async(func() error {
		_, err := f.ReadAt(p, offset)
		return err
	})
}

// within returns what comes from done, which has to be soon.
func (w world) within(what string, limit time.Duration, done <-chan error) error {
	w.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		w.Fatalf("%s has not ended after %v", what, limit)
		return nil
	}
}

// wantStuck checks that nothing comes from done for that long.
func wantStuck[T any](w world, what string, long time.Duration, done <-chan T) {
	w.Helper()
	select {
	case got := <-done:
		w.Fatalf("%s has ended (%v), it should hang", what, got)
	case <-time.After(long):
	}
}

// soon is more than what takes no time, even on a machine that is busy with other things.
const soon = 30 * time.Second

// A listener hears what the kernel announces to all.
type listener struct{ *genetlink.Conn }

func (k rawKernel) listen() listener {
	k.Helper()
	conn, err := genetlink.Dial(nil)
	if err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() { conn.Close() })
	for _, g := range k.family.Groups {
		if err := conn.JoinGroup(g.ID); err != nil {
			k.Fatal(err)
		}
	}
	return listener{conn}
}

// dead waits for the announcement that a connection of the device is dead, and returns its
// attributes.
func (w world) dead(l listener, index int) []netlink.Attribute {
	w.Helper()
	for {
		if err := l.SetReadDeadline(time.Now().Add(soon)); err != nil {
			w.Fatal(err)
		}
		messages, _, err := l.Receive()
		if err != nil {
			w.Fatalf("no announcement that a connection of nbd%d is dead: %v", index, err)
		}
		for _, m := range messages {
			attrs, err := netlink.UnmarshalAttributes(m.Data)
			if err != nil || m.Header.Command != nbdCmdLinkDead {
				w.Fatalf("message %+v, error %v", m, err)
			}
			ad, err := netlink.NewAttributeDecoder(m.Data)
			if err != nil {
				w.Fatal(err)
			}
			for ad.Next() {
				if ad.Type() == nbdAttrIndex && int(ad.Uint32()) == index {
					return attrs
				}
			}
		}
	}
}
