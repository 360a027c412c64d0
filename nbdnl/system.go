package nbdnl

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A System is the machine whose devices a Client controls. The zero value is the running one; tests
// take one from package nbdnltest. A container that sees the host's file systems elsewhere sets
// Root.
//
// The fields must not change while a Client uses them.
type System struct {
	// Mode is the interface by which devices are controlled: ModeNetlink, or ModeIoctl, or, when it
	// is ModeNone, netlink if the kernel shows its family in this network namespace, and ioctls if
	// not.
	Mode Mode

	// Root is the directory that holds sys, proc, dev and run; empty is the root directory.
	Root string

	// StateDir is the directory in which programs claim and lease devices (package claim), as it is
	// seen from here; empty is claim.Default below Root. Programs that are to keep out of each
	// other's way need the same one.
	StateDir string

	// NetNS is the network namespace in which netlink is used, as an open file such as
	// /proc/1/ns/net; nil is that of the calling thread. Up to Linux 6.1 the kernel shows its nbd
	// family in the initial one only.
	NetNS *os.File

	// Dial opens what takes the place of a generic netlink socket; nil opens one of the kernel's.
	// It is called once for every command that runs at the same time as others.
	Dial func() (Socket, error)

	// Uevents opens the kernel's uevents, each Read returning one; nil takes the running kernel's.
	Uevents func() (io.ReadCloser, error)

	// DeviceNumber returns the number ("43:96") of the block device that a path leads to, and false
	// for anything else; nil asks the file system.
	DeviceNumber func(path string) (string, bool)

	// Open opens a device by its path, with the flags of os.OpenFile; nil is os.OpenFile.
	Open func(path string, flag int) (Device, error)

	// Ioctl makes an ioctl on what Open has opened, and blocks for as long as the kernel does; nil
	// is ioctl(2).
	Ioctl func(d Device, request, arg uintptr) error
}

// A Device is an open block device, such as an *os.File.
type Device interface {
	io.Closer
	// Sync writes what is cached and waits until the server has made it durable.
	Sync() error
}

// root is where the files of the system are.
func (s *System) root() machine.Root { return machine.Root(s.Root) }

// path returns the path of a file, given from the root directory on.
func (s *System) path(elem ...string) string { return s.root().Path(elem...) }

// device returns the path of the device node.
func (s *System) device(index int) string { return s.path(Path(index)) }

// Holders returns what finds out who uses devices of the system.
func (s System) Holders() *holder.Finder {
	return &holder.Finder{Root: s.root(), DeviceNumber: s.DeviceNumber}
}

// Claims returns the directory in which programs agree on who may change which device of the
// system.
func (s System) Claims() claim.Dir {
	if s.StateDir == "" {
		return claim.Dir(s.path(claim.Default))
	}
	return claim.Dir(s.StateDir)
}

// open opens the device node.
func (s *System) open(index, flag int) (Device, error) {
	if s.Open != nil {
		return s.Open(s.device(index), flag)
	}
	f, err := os.OpenFile(s.device(index), flag, 0)
	if err != nil {
		return nil, err // and no Device that holds a nil pointer
	}
	return f, nil
}

// ioctl makes an ioctl on an open device. The error matches os.ErrClosed when it was closed
// meanwhile.
func (s *System) ioctl(d Device, request, arg uintptr) error {
	if s.Ioctl != nil {
		return s.Ioctl(d, request, arg)
	}
	conn, ok := d.(syscall.Conn)
	if !ok {
		return fmt.Errorf("a %T takes no ioctls: %w", d, errors.ErrUnsupported)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	err = os.ErrClosed
	_ = raw.Control(func(fd uintptr) { err = ioctl(int(fd), request, arg) }) // fails for what is closed
	return err
}

// uevents opens the kernel's uevents.
func (s *System) uevents() (io.ReadCloser, error) {
	if s.Uevents != nil {
		return s.Uevents()
	}
	return openUevents()
}

// initialUserNamespace is the initial user namespace's inode number: PROC_USER_INIT_INO in
// linux/proc_ns.h.
const initialUserNamespace = "user:[4026531837]"

// userNamespaced reports whether this process is known to be in another user namespace. The kernel
// sends uevents to those network namespaces only that belong to the initial one (uevent_net_init).
func (s *System) userNamespaced() bool {
	ns, err := os.Readlink(s.path("proc/self/ns/user"))
	return err == nil && ns != initialUserNamespace
}
