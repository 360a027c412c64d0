package nbdnltest

import (
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// Options describe a kernel. The zero value is one with 16 devices, as the module makes by default,
// of Linux 6.12.
type Options struct {
	// Devices is the number of devices that exist from the start; 0 is 16.
	Devices int
	// Release is the kernel's; it decides what /sys shows. Empty is "6.12.0".
	Release string
	// NoModule is a kernel without the driver. HideFamily hides the driver's netlink family, as up
	// to Linux 6.1 outside of the initial network namespace. NoPrivilege refuses what needs
	// CAP_SYS_ADMIN.
	NoModule, HideFamily, NoPrivilege bool
	// HideThreads hides the kernel's threads, as in a PID namespace other than the initial one.
	HideThreads bool
}

// A Kernel is a fake NBD driver. Its methods may be called concurrently.
type Kernel struct {
	t       testing.TB
	options Options
	tree    tree

	// genl is genl_mutex: commands run one after the other, so that one which blocks blocks all. It
	// has room for one, and is no sync.Mutex, which package synctest does not see through.
	genl chan struct{}

	mu      sync.Mutex // guards all below, and the devices
	devices map[int]*device
	gates   map[Command]chan struct{}
	errnos  map[Command]syscall.Errno
	mute    map[Command]int
	counts  map[Command]int
	readers map[*ueventReader]bool
	sockets int              // netlink sockets that are open
	group   map[*socket]bool // those who have joined the multicast group
	ignored uint64           // server flags
	rigid   bool             // sizes can't be changed
	nextPID int
	undo    []time.Duration // how long after its reconnection a socket is shut down, of the next ones
	strand  []int           // how many receivers do not start, of the devices that are connected next
	over    bool            // the test has ended
}

// New makes a kernel whose files live in a temporary directory of the test.
func New(t testing.TB, o Options) *Kernel {
	t.Helper()
	if o.Devices == 0 {
		o.Devices = 16
	}
	if o.Release == "" {
		o.Release = "6.12.0"
	}
	k := &Kernel{
		t:       t,
		options: o,
		genl:    make(chan struct{}, 1),
		tree:    tree{t: t, root: t.TempDir()},
		devices: make(map[int]*device),
		gates:   make(map[Command]chan struct{}),
		errnos:  make(map[Command]syscall.Errno),
		mute:    make(map[Command]int),
		counts:  make(map[Command]int),
		readers: make(map[*ueventReader]bool),
		group:   make(map[*socket]bool),
		nextPID: 4000,
	}
	k.tree.init(o.Release)
	k.tree.discards = !k.atLeast(5, 14)
	if !o.HideThreads {
		k.tree.write("kthreadd\n", "proc/2/comm")
		k.tree.write("", threadList)
	}
	if !o.NoModule {
		for index := range o.Devices {
			k.add(index)
		}
	}
	t.Cleanup(k.reset)
	return k
}

// System returns the system in which this is the kernel.
func (k *Kernel) System() nbdnl.System {
	return nbdnl.System{
		Root:         k.tree.root,
		Dial:         k.dial,
		Uevents:      k.openUevents,
		DeviceNumber: k.tree.deviceNumber,
		Open:         k.open,
		Ioctl:        k.ioctl,
	}
}

// Client returns a client of this kernel, which is closed with the test.
func (k *Kernel) Client() *nbdnl.Client {
	k.t.Helper()
	c, err := k.System().NewClient()
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			k.t.Error(err)
		}
	})
	return c
}

// Fail makes the next command of that kind fail before it does anything.
func (k *Kernel) Fail(c Command, errno syscall.Errno) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.errnos[c] = errno
}

// Mute makes the next command of that kind lose its answer, as for want of memory; called twice,
// the next two.
func (k *Kernel) Mute(c Command) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mute[c]++
}

// Block keeps commands of that kind in the kernel until the function that it returns is called, and
// so blocks the commands after them too, whatever they are.
func (k *Kernel) Block(c Command) (unblock func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	gate := make(chan struct{})
	k.gates[c] = gate
	unblock = sync.OnceFunc(func() { close(gate) })
	k.t.Cleanup(unblock)
	return unblock
}

// Commands returns how many commands of that kind were given, those that wait for another one to
// end included.
func (k *Kernel) Commands(c Command) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.counts[c]
}

// Sockets returns how many netlink sockets are open.
func (k *Kernel) Sockets() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sockets
}

// Hold lets a made-up process open the device, until the function that it returns is called.
func (k *Kernel) Hold(index int) (pid int, release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nextPID++
	pid = k.nextPID
	d := k.add(index)
	d.hold()
	k.tree.process(pid, "holder", index)
	return pid, sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.tree.remove("proc", itoa(pid))
		d.put()
	})
}

// Mount makes a file system on the device appear as mounted, until the function that it returns is
// called.
func (k *Kernel) Mount(index int, point string) (unmount func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.add(index)
	d.hold()
	d.exclusive = true
	k.tree.mount(index, point)
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.tree.unmount(point)
		d.exclusive = false
		d.put()
	})
}

// ConnectIoctl makes the device appear as connected by ioctls, with no socket behind it, until
// somebody disconnects it.
func (k *Kernel) ConnectIoctl(index int, size uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.add(index)
	d.hold()
	d.config.ref, d.config.shown = true, true
	k.tree.write(itoa(os.Getpid())+"\n", attribute(index, "pid"))
	k.tree.size(index, size)
	k.announce("change", index)
}

// Ignore makes the kernel ignore these flags of the servers that are connected from now on.
func (k *Kernel) Ignore(flags nbdnl.Flags) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ignored = uint64(flags)
}

// Undo makes the kernel shut down the next socket that takes the place of a dead connection, after
// that time, and the one after it, and so on. So does a receiver that notices the end of its
// connection late (recv_work, nbd_mark_nsock_dead).
func (k *Kernel) Undo(after ...time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.undo = append(k.undo, after...)
}

// Strand makes so many receivers of the next device that is connected never start, and of the one
// after it, and so on. So does a machine that is slow to make threads (rescuer_thread).
func (k *Kernel) Strand(receivers ...int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.strand = append(k.strand, receivers...)
}

// LinkDead tells, as the kernel does when it notices, that connections of the device have died.
// What they are is seen from the sockets themselves, which the caller ends.
func (k *Kernel) LinkDead(index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(nbdAttrIndex, uint32(index))
	k.multicast(nbdCmdLinkDead, k.encode(ae))
}

// Remove removes an idle device, as DESTROY_ON_DISCONNECT or the end of the module does.
func (k *Kernel) Remove(index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.remove(index)
}

func (k *Kernel) remove(index int) {
	delete(k.devices, index)
	k.tree.remove("sys/block", name(index))
	k.tree.remove("dev", name(index))
	k.announce("remove", index)
}

// Reload makes the module end, with all devices that are idle, and come back with as many as at
// first.
func (k *Kernel) Reload() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for index := range k.devices {
		k.remove(index)
	}
	clear(k.group)
	for index := range k.options.Devices {
		k.add(index)
	}
}

// Announce sends a uevent of the device with that action, such as "change".
func (k *Kernel) Announce(action string, index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.announce(action, index)
}

// IgnoreSize makes the kernel obey reconfigures without regard to the sizes in them.
func (k *Kernel) IgnoreSize() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rigid = true
}

// Replace makes the device appear as if it had been disconnected, and connected by another with the
// same identifier.
func (k *Kernel) Replace(index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tree.bury(attribute(index, "pid"))
	k.tree.write(itoa(os.Getpid())+"\n", attribute(index, "pid"))
}

// Partition makes a partition of the device appear, as the scan within an open does.
func (k *Kernel) Partition(index, number int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tree.partition(index, number)
}

// FailSync makes every fsync of the device return err.
func (k *Kernel) FailSync(index int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.add(index).syncErr = err
}

// Hang makes an fsync of the device wait until the device is disconnected, and then fail with EIO,
// as with a server that does not answer.
func (k *Kernel) Hang(index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.add(index).hung = make(chan struct{})
}

// Syncs returns how many times the device was synced.
func (k *Kernel) Syncs(index int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.add(index).syncs
}

// A Setting is what the kernel was told at connect and since, of which sysfs shows only a part.
// Units are those of the attributes: bytes and seconds.
type Setting struct {
	Size, BlockSize          uint64
	Timeout, DeadConnTimeout uint64
	ServerFlags, ClientFlags uint64
	Identifier               string
	Sockets                  int
}

// Setting returns the device's setting; the zero value when it is not connected.
func (k *Kernel) Setting(index int) Setting {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.add(index); d.config != nil && d.config.bound {
		s := d.config.setting
		s.Sockets = len(d.config.sockets)
		return s
	}
	return Setting{}
}

// Dead returns how many connections of the device are dead.
func (k *Kernel) Dead(index int) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.add(index); d.config != nil {
		for _, fd := range d.config.sockets {
			if isDead(fd) {
				n++
			}
		}
	}
	return n
}

// Path returns the path of a file of the kernel's system: Path("sys/block/nbd0/size").
func (k *Kernel) Path(name string) string { return filepath.Join(k.tree.root, name) }

// add returns the device with that index, which it creates if there is none (nbd_dev_add).
func (k *Kernel) add(index int) *device {
	if d := k.devices[index]; d != nil {
		return d
	}
	d := &device{kernel: k, index: index}
	k.devices[index] = d
	k.tree.add(index)
	k.announce("add", index)
	return d
}

// reset lets go of everything at the end of the test.
func (k *Kernel) reset() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	for _, d := range k.devices {
		if d.config != nil {
			d.config.close()
		}
	}
}

// dial opens a netlink socket.
func (k *Kernel) dial() (nbdnl.Socket, error) {
	s := &socket{kernel: k, closed: make(chan struct{})}
	s.wake = make(chan struct{}, 1)
	k.mu.Lock()
	k.sockets++
	k.mu.Unlock()
	return s, nil
}
