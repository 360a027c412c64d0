package nbdnltest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// A device is one of the driver's (struct nbd_device). Its methods are called with the kernel's mu
// held.
type device struct {
	kernel *Kernel
	index  int

	// config lives while refs is not zero: each opener has one, and so has the connection.
	config *config
	refs   int

	exclusive bool // opened with O_EXCL, or mounted
	syncErr   error
	syncs     int
	hung      chan struct{} // closed when the device is disconnected; nil: fsync does not hang
}

// A config is a device's use by one server (struct nbd_config).
type config struct {
	setting Setting
	sockets []int
	bound   bool // NBD_RT_BOUND: connected by netlink
	ref     bool // NBD_RT_HAS_CONFIG_REF: the connection holds a reference
	shown   bool // `pid` is there
	setter  int  // the thread that sets it up by ioctls (task_setup); 0: none yet
	strand  int  // receivers that do not start
	late    int  // receivers of dead connections that have not noticed yet
}

// hold takes a reference to the config, and makes one where there is none, as nbd_open does.
func (d *device) hold() {
	if d.refs == 0 {
		d.config = &config{setting: Setting{BlockSize: nbdDefaultBlockSize}}
	}
	d.refs++
}

// put gives up a reference; the last one takes the config with it (nbd_config_put).
func (d *device) put() {
	if d.refs--; d.refs > 0 {
		return
	}
	k, c := d.kernel, d.config
	d.config = nil
	c.close()
	k.showReceivers(d)
	if c.shown {
		k.tree.size(d.index, 0)
		k.announce("change", d.index)
		k.tree.bury(attribute(d.index, "pid"))
		k.tree.remove(attribute(d.index, "backend"))
	}
}

// disconnect ends the connection (nbd_disconnect_and_put). An open device looks as before.
func (d *device) disconnect() {
	c := d.config
	if c == nil {
		return
	}
	for _, fd := range c.sockets {
		sendDisc(fd)
		shutdown(fd)
	}
	c.bound = false
	c.setter = 0
	d.release()
	if c.ref {
		c.ref = false
		d.put()
	}
}

// release lets an fsync that hangs fail.
func (d *device) release() {
	if d.hung != nil {
		close(d.hung)
		d.hung = nil
	}
}

// Release lets an fsync that hangs fail with EIO.
func (k *Kernel) Release(index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.add(index).release()
}

func (c *config) close() {
	for _, fd := range c.sockets {
		shutdown(fd)
		closeFD(fd)
	}
	c.sockets = nil
}

// open opens a device node, as os.OpenFile does.
func (k *Kernel) open(path string, flag int) (nbdnl.Device, error) {
	index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), "nbd"))
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: syscall.ENOENT}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.devices[index]
	switch {
	case d == nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: syscall.ENOENT}
	case flag&syscall.O_EXCL != 0 && d.exclusive:
		return nil, &os.PathError{Op: "open", Path: path, Err: syscall.EBUSY}
	}
	d.hold()
	if !d.config.bound {
		k.tree.dropPartitions(index) // the scan of a disk without a size finds none
	}
	o := &opened{device: d, exclusive: flag&syscall.O_EXCL != 0}
	d.exclusive = d.exclusive || o.exclusive
	return o, nil
}

// An opened is an open device.
type opened struct {
	device    *device
	exclusive bool
	closed    bool // guarded by the kernel's mu
}

// Sync does what FailSync and Hang ordered.
func (o *opened) Sync() error {
	d := o.device
	d.kernel.mu.Lock()
	d.syncs++
	hung, err := d.hung, d.syncErr
	d.kernel.mu.Unlock()
	if hung != nil {
		<-hung
		return syscall.EIO
	}
	return err
}

// Close releases the device.
func (o *opened) Close() error {
	d := o.device
	d.kernel.mu.Lock()
	defer d.kernel.mu.Unlock()
	if o.closed {
		return os.ErrClosed
	}
	o.closed = true
	if o.exclusive {
		d.exclusive = false
	}
	d.put()
	return nil
}
