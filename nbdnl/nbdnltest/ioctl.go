package nbdnltest

import (
	"os"
	"sync"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// ioctl is nbd_ioctl.
func (k *Kernel) ioctl(dev nbdnl.Device, request, arg uintptr) error {
	o, ok := dev.(*opened)
	if !ok {
		return syscall.ENOTTY
	}
	if k.options.NoPrivilege {
		return syscall.EPERM
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if o.closed {
		return os.ErrClosed
	}
	if o.device.config.bound && request != nbdDisconnect && request != nbdClearSock {
		return syscall.EINVAL
	}
	if errno := k.obey(o.device, request, uint64(arg)); errno != 0 {
		return errno
	}
	return nil
}

// obey is __nbd_ioctl.
func (k *Kernel) obey(d *device, command uintptr, arg uint64) syscall.Errno {
	c := d.config
	switch command {
	case nbdSetSock:
		return c.addSocket(arg)
	case nbdSetBlockSize:
		return k.setSizes(d, request{blockSize: &arg})
	case nbdSetSizeBlocks:
		size := arg * c.setting.BlockSize
		return k.setSizes(d, request{size: &size})
	case nbdSetTimeout:
		c.setting.Timeout = arg
	case nbdSetFlags:
		c.setting.ServerFlags = arg
	case nbdDoIt:
		return k.doIt(d)
	case nbdDisconnect:
		for _, fd := range c.sockets {
			sendDisc(fd)
		}
	case nbdClearSock:
		for _, fd := range c.sockets {
			shutdown(fd)
		}
		c.setter = 0
		d.release()
		if c.ref {
			c.ref, c.bound = false, false
			d.put()
		}
	default:
		return syscall.ENOTTY
	}
	return 0
}

// addSocket is nbd_add_socket: the first thread to come is the only one.
func (c *config) addSocket(fd uint64) syscall.Errno {
	own, errno := lookupSocket(uint32(fd))
	if errno != 0 {
		return errno
	}
	if c.setter == 0 {
		c.setter = threadID()
	}
	if c.setter != threadID() {
		closeFD(own)
		return syscall.EBUSY
	}
	c.sockets = append(c.sockets, own)
	return 0
}

// setSizes is nbd_set_size.
func (k *Kernel) setSizes(d *device, r request) syscall.Errno {
	before := d.config.setting.Size
	if errno := d.config.setSize(&r); errno != 0 {
		return errno
	}
	if d.config.shown {
		k.resized(d, before)
	}
	return 0
}

// doIt is nbd_start_device_ioctl. It is called with mu held, and lets go of it while the device
// lives.
func (k *Kernel) doIt(d *device) syscall.Errno {
	c := d.config
	switch {
	case c.shown:
		return syscall.EBUSY
	case len(c.sockets) == 0, len(c.sockets) > 1 && c.setting.ServerFlags&nbdFlagCanMultiConn == 0:
		return syscall.EINVAL
	}
	k.tree.thread(threadID())
	k.show(d, threadID())
	// Each socket has a receiver, which has a reference to the configuration (recv_work).
	var receivers sync.WaitGroup
	for _, fd := range c.sockets {
		receivers.Go(func() { waitDead(fd) })
	}
	d.refs++
	k.mu.Unlock()
	receivers.Wait()
	k.mu.Lock()
	d.put()
	if d.refs == 1 {
		k.tree.size(d.index, 0)
	}
	return 0
}
