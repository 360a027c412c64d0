package nbdnltest

import (
	"fmt"
	"os"
	"syscall"

	"github.com/mdlayher/netlink"
)

// A request holds the attributes of one command; a nil pointer is an absent one.
type request struct {
	index                    *uint32
	size, blockSize          *uint64
	timeout, deadConnTimeout *uint64
	serverFlags, clientFlags *uint64
	identifier               *string
	fds                      []uint32
	hasSockets               bool
}

// decodeRequest reads attributes as liberally as the kernel does: it ignores unknown ones.
func decodeRequest(b []byte) (request, error) {
	var r request
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return r, err
	}
	u64 := func() *uint64 { v := ad.Uint64(); return &v }
	for ad.Next() {
		switch ad.Type() {
		case nbdAttrIndex:
			v := ad.Uint32()
			r.index = &v
		case nbdAttrSizeBytes:
			r.size = u64()
		case nbdAttrBlockSizeBytes:
			r.blockSize = u64()
		case nbdAttrTimeout:
			r.timeout = u64()
		case nbdAttrDeadConnTimeout:
			r.deadConnTimeout = u64()
		case nbdAttrServerFlags:
			r.serverFlags = u64()
		case nbdAttrClientFlags:
			r.clientFlags = u64()
		case nbdAttrBackendIdentifier:
			v := ad.String()
			r.identifier = &v
		case nbdAttrSockets:
			r.hasSockets = true
			ad.Nested(r.decodeSockets)
		}
	}
	return r, ad.Err()
}

func (r *request) decodeSockets(list *netlink.AttributeDecoder) error {
	for list.Next() {
		if list.Type() != nbdSockItem {
			continue
		}
		list.Nested(func(item *netlink.AttributeDecoder) error {
			for item.Next() {
				if item.Type() == nbdSockFD {
					r.fds = append(r.fds, item.Uint32())
				}
			}
			return nil
		})
	}
	return nil
}

// execute runs a command and returns the attributes of its reply, nil if it has none.
func (k *Kernel) execute(c Command, b []byte) ([]byte, syscall.Errno) {
	k.mu.Lock()
	gate := k.gates[c]
	errno, failed := k.errnos[c]
	delete(k.errnos, c)
	k.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if failed {
		return nil, errno
	}
	r, err := decodeRequest(b)
	if err != nil {
		return nil, syscall.EINVAL
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if c != Status && k.options.NoPrivilege {
		return nil, syscall.EPERM
	}
	switch c {
	case Connect:
		return k.connect(&r)
	case Disconnect:
		return nil, k.disconnect(&r)
	case Reconfigure:
		return nil, k.reconfigure(&r)
	case Status:
		return k.status(&r), 0
	}
	return nil, syscall.EOPNOTSUPP
}

// connect is nbd_genl_connect.
func (k *Kernel) connect(r *request) ([]byte, syscall.Errno) {
	if !r.hasSockets || r.size == nil {
		return nil, syscall.EINVAL
	}
	var d *device
	switch {
	case r.index == nil:
		d = k.free()
	case *r.index > maxIndex:
		return nil, syscall.EINVAL
	default:
		d = k.add(int(*r.index))
	}
	if d.refs > 0 {
		return nil, syscall.EBUSY
	}
	d.hold()
	c := d.config
	c.bound = true
	c.setting = Setting{
		Timeout:         value(r.timeout),
		DeadConnTimeout: value(r.deadConnTimeout),
		ServerFlags:     value(r.serverFlags),
		ClientFlags:     value(r.clientFlags),
		Identifier:      value(r.identifier),
		BlockSize:       nbdDefaultBlockSize,
	}
	if errno := k.start(d, r); errno != 0 {
		c.bound = false
		d.put() // shuts down the sockets that it has got that far
		return nil, errno
	}
	if t := c.setting.Timeout; t != 0 {
		for _, fd := range c.sockets {
			limitSends(fd, t)
		}
	}
	c.ref = true
	if len(k.strand) > 0 {
		c.strand = k.strand[0]
		k.strand = k.strand[1:]
	}
	k.showReceivers(d)
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(nbdAttrIndex, uint32(d.index))
	return k.encode(ae), 0
}

// start configures a device and shows it.
func (k *Kernel) start(d *device, r *request) syscall.Errno {
	c := d.config
	if errno := c.setSize(r); errno != 0 {
		return errno
	}
	for _, n := range r.fds {
		fd, errno := lookupSocket(n)
		if errno != 0 {
			return errno
		}
		c.sockets = append(c.sockets, fd)
	}
	if len(c.sockets) == 0 || len(c.sockets) > 1 && c.setting.ServerFlags&nbdFlagCanMultiConn == 0 {
		return syscall.EINVAL
	}
	if k.identifiers() {
		k.tree.write(c.setting.Identifier+"\n", attribute(d.index, "backend"))
	}
	k.show(d, os.Getpid())
	return 0
}

// show shows a device that a thread has started (nbd_start_device).
func (k *Kernel) show(d *device, tid int) {
	c := d.config
	k.tree.write(itoa(tid)+"\n", attribute(d.index, "pid"))
	k.tree.write(bit(c.setting.ServerFlags&nbdFlagReadOnly != 0), attribute(d.index, "ro"))
	k.tree.queue(d.index, k.acted(c.setting.ServerFlags))
	k.tree.write(itoa(int(c.setting.BlockSize))+"\n", attribute(d.index, "queue/logical_block_size"))
	k.tree.size(d.index, c.setting.Size)
	c.shown = true
	k.announce("change", d.index)
}

// setSize is nbd_genl_size_set.
func (c *config) setSize(r *request) syscall.Errno {
	block := c.setting.BlockSize
	if r.blockSize != nil {
		if block = *r.blockSize; block == 0 {
			block = nbdDefaultBlockSize
		}
		if block < 512 || block > uint64(os.Getpagesize()) || block&(block-1) != 0 {
			return syscall.EINVAL
		}
	}
	size := c.setting.Size
	if r.size != nil {
		size = *r.size
	}
	if int64(size) < 0 {
		return syscall.EINVAL
	}
	c.setting.Size, c.setting.BlockSize = size, block
	return 0
}

// free returns the first device without a config, or a new one.
func (k *Kernel) free() *device {
	for index := 0; ; index++ {
		if d := k.devices[index]; d == nil || d.refs == 0 {
			return k.add(index)
		}
	}
}

// disconnect is nbd_genl_disconnect.
func (k *Kernel) disconnect(r *request) syscall.Errno {
	if r.index == nil || k.devices[int(*r.index)] == nil {
		return syscall.EINVAL
	}
	k.devices[int(*r.index)].disconnect()
	return 0
}

// reconfigure is nbd_genl_reconfigure.
func (k *Kernel) reconfigure(r *request) syscall.Errno {
	if r.index == nil {
		return syscall.EINVAL
	}
	d := k.devices[int(*r.index)]
	if d == nil || d.config == nil || !d.config.bound {
		return syscall.EINVAL
	}
	c := d.config
	if id := c.setting.Identifier; id != "" && k.identifiers() && value(r.identifier) != id {
		return syscall.EINVAL
	}
	before := c.setting
	if k.rigid {
		r.size, r.blockSize = nil, nil
	}
	if errno := c.setSize(r); errno != 0 {
		return errno
	}
	k.resized(d, before.Size)
	replace(&c.setting.Timeout, r.timeout)
	replace(&c.setting.DeadConnTimeout, r.deadConnTimeout)
	replace(&c.setting.ClientFlags, r.clientFlags)
	for _, n := range r.fds {
		fd, errno := lookupSocket(n)
		if errno != 0 {
			return errno
		}
		if !d.reconnect(fd) {
			break // nbd_reconnect_socket says ENOSPC, and nobody is told
		}
	}
	return 0
}

// resized shows the sizes of a device whose size may be another now.
func (k *Kernel) resized(d *device, before uint64) {
	now := d.config.setting
	if now.Size != before {
		k.tree.size(d.index, now.Size)
		k.announce("change", d.index, "RESIZE=1")
	}
	k.tree.write(itoa(int(now.BlockSize))+"\n", attribute(d.index, "queue/logical_block_size"))
}

// reconnect is nbd_reconnect_socket: it puts a socket in the place of the first dead one. Where
// none is dead the socket is dropped.
func (d *device) reconnect(fd int) bool {
	c := d.config
	for i, old := range c.sockets {
		if isDead(old) {
			shutdown(old)
			closeFD(old)
			c.sockets[i] = fd
			if t := c.setting.Timeout; t != 0 {
				limitSends(fd, t)
			}
			d.kernel.receive(d, fd)
			return true
		}
	}
	closeFD(fd)
	return false
}

// status is nbd_genl_status.
func (k *Kernel) status(r *request) []byte {
	ae := netlink.NewAttributeEncoder()
	// Encoded by hand rather than with Nested, which sets a bit that the kernel does not.
	ae.Do(nbdAttrDeviceList, func() ([]byte, error) {
		list := netlink.NewAttributeEncoder()
		for index, d := range k.asked(r) {
			list.Do(nbdDeviceItem, func() ([]byte, error) {
				item := netlink.NewAttributeEncoder()
				item.Uint32(nbdDeviceIndex, uint32(index))
				item.Uint8(nbdDeviceConnected, bit(d.refs > 0)[0]-'0')
				return item.Encode()
			})
		}
		return list.Encode()
	})
	return k.encode(ae)
}

// asked returns the devices that a status is asked for: one, or none, or all.
func (k *Kernel) asked(r *request) map[int]*device {
	if r.index == nil {
		return k.devices
	}
	index := int(*r.index)
	if d := k.devices[index]; d != nil {
		return map[int]*device{index: d}
	}
	return nil
}

func (k *Kernel) encode(ae *netlink.AttributeEncoder) []byte {
	b, err := ae.Encode()
	if err != nil {
		k.t.Errorf("fake kernel: reply can't be encoded: %v", err)
	}
	return b
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func replace[T any](v, p *T) {
	if p != nil {
		*v = *p
	}
}

// identifiers reports whether this release keeps and shows identifiers.
func (k *Kernel) identifiers() bool { return k.atLeast(5, 14) }

// acted returns those of the server's flags that this release acts upon (nbd_parse_flags and
// __nbd_set_size).
func (k *Kernel) acted(flags uint64) uint64 {
	if !k.atLeast(6, 12) {
		flags &^= nbdFlagRotational | nbdFlagSendWriteZeroes
	}
	if flags&nbdFlagSendFlush == 0 {
		flags &^= nbdFlagSendFUA
	}
	return flags &^ k.ignored
}

// atLeast reports whether this release is that one or a later one.
func (k *Kernel) atLeast(major, minor int) bool {
	var m, n int
	if _, err := fmt.Sscanf(k.options.Release, "%d.%d", &m, &n); err != nil {
		k.t.Errorf("fake kernel: release %q: %v", k.options.Release, err)
	}
	return m > major || m == major && n >= minor
}
