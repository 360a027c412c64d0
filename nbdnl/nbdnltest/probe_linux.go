package nbdnltest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// probeIndex is the device of the probes: one that no test uses, for some kernels do not forget
// limits.
const probeIndex = 1000

// A probe is a command to connect a device, given past package nbdnl.
type probe struct {
	socket     int // SOCK_STREAM or another kind
	size       uint64
	blockSize  uint64
	flags      uint64
	identifier string
}

const probeSize = 1 << 20

// run connects the device, gives look its directory in sysfs, and ends it. A refusal of the
// kernel's is a syscall.Errno.
func (p probe) run(look func(dir string) error) error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	family, err := conn.GetFamily("nbd")
	if err != nil {
		return err
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, p.socket|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(ends[0])
	defer closeFD(ends[1])
	execute := func(c Command, flags netlink.HeaderFlags, attrs func(*netlink.AttributeEncoder)) error {
		ae := netlink.NewAttributeEncoder()
		ae.Uint32(nbdAttrIndex, probeIndex)
		attrs(ae)
		data, err := ae.Encode()
		if err != nil {
			return err
		}
		m := genetlink.Message{Header: genetlink.Header{Command: uint8(c), Version: genlVersion}, Data: data}
		_, err = conn.Execute(m, family.ID, flags)
		return err
	}
	err = execute(Connect, netlink.Request, func(ae *netlink.AttributeEncoder) { p.encode(ae, ends[1]) })
	if err != nil {
		return err
	}
	if look != nil {
		err = look(filepath.Join("/sys/block", "nbd"+strconv.Itoa(probeIndex)))
	}
	end := execute(Disconnect, netlink.Request|netlink.Acknowledge, func(*netlink.AttributeEncoder) {})
	return errors.Join(err, end)
}

func (p probe) encode(ae *netlink.AttributeEncoder, fd int) {
	ae.Uint64(nbdAttrSizeBytes, p.size)
	ae.Uint64(nbdAttrBlockSizeBytes, p.blockSize)
	ae.Uint64(nbdAttrTimeout, 5)
	ae.Uint64(nbdAttrServerFlags, p.flags)
	if p.identifier != "" {
		ae.String(nbdAttrBackendIdentifier, p.identifier)
	}
	ae.Nested(nbdAttrSockets, func(list *netlink.AttributeEncoder) error {
		list.Nested(nbdSockItem, func(item *netlink.AttributeEncoder) error {
			item.Uint32(nbdSockFD, uint32(fd))
			return nil
		})
		return nil
	})
}

// accepts reports whether the kernel connects a device so, and not that it refuses it as invalid.
func (p probe) accepts() (bool, error) {
	err := p.run(nil)
	if errors.Is(err, syscall.EINVAL) {
		return false, nil
	}
	return err == nil, err
}

// shows reports whether a number in the connected device's directory in sysfs is not zero.
func (p probe) shows(file string) (has bool, err error) {
	err = p.run(func(dir string) error {
		n, err := readNumber(filepath.Join(dir, file))
		has = n != 0
		return err
	})
	return has, err
}

func readNumber(file string) (uint64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
}

// usual is a device that every kernel connects.
func usual() probe {
	return probe{socket: unix.SOCK_STREAM, size: probeSize, blockSize: 512, flags: 1}
}

func probeIdentifiers() (has bool, err error) {
	p := usual()
	p.identifier = "probe:1"
	err = p.run(func(dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, "backend"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		has = string(bytes.TrimSpace(b)) == p.identifier
		return err
	})
	return has, err
}

func probeStreamSockets() (bool, error) {
	p := usual()
	p.socket = unix.SOCK_DGRAM
	accepted, err := p.accepts()
	return !accepted, err
}

func probePositiveSizes() (bool, error) {
	p := usual()
	p.size = 1 << 63
	accepted, err := p.accepts()
	return !accepted, err
}

func probeForgetsTrim() (bool, error) {
	p := usual()
	p.flags |= nbdFlagSendTrim
	var limit string
	err := p.run(func(dir string) error {
		limit = filepath.Join(dir, "queue/discard_max_bytes")
		n, err := readNumber(limit)
		if err == nil && n == 0 {
			return fmt.Errorf("%s is 0 of a device that takes trims", limit)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	n, err := readNumber(limit)
	return n == 0, err
}

func probeForgetsZeroes() (bool, error) {
	if _, err := probeWriteZeroes(); err != nil {
		return false, err
	}
	has, err := usual().shows("queue/write_zeroes_max_bytes")
	return !has, err
}

func probeWriteZeroes() (bool, error) {
	p := usual()
	p.flags |= nbdFlagSendFlush | nbdFlagSendWriteZeroes
	return p.shows("queue/write_zeroes_max_bytes")
}

func probeRotational() (bool, error) {
	p := usual()
	p.flags |= nbdFlagRotational
	return p.shows("queue/rotational")
}

func probeLargeBlocks() (bool, error) {
	p := usual()
	p.blockSize = 2 * uint64(os.Getpagesize())
	return p.accepts()
}

// probeNamespaces looks for the family in a new network namespace, which goes with its only thread.
func probeNamespaces() (bool, error) {
	found := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		found <- findFamilyElsewhere()
	}()
	err := <-found
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func findFamilyElsewhere() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	_, err = conn.GetFamily("nbd")
	return errors.Join(err, conn.Close())
}
