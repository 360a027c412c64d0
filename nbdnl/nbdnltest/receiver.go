package nbdnltest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// threadList is the file that lists the kernel's threads.
const threadList = "proc/2/task/2/children"

// firstReceiver is the number of the first thread that receives for a device; each device has room
// for a hundred.
const firstReceiver = 1 << 20

// receive starts a receiver for a socket that has taken the place of a dead connection. The one
// before it is late if a test wants it, and shuts down what it finds in its place.
func (k *Kernel) receive(d *device, fd int) {
	if len(k.undo) > 0 {
		after := k.undo[0]
		k.undo = k.undo[1:]
		c := d.config
		c.late++
		time.AfterFunc(after, func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			if k.over || d.config != c {
				return // with all its sockets
			}
			if slices.Contains(c.sockets, fd) {
				shutdown(fd)
			}
			c.late--
			k.showReceivers(d)
		})
	}
	k.showReceivers(d)
}

// showReceivers shows the threads that receive for a device: one for each connection, which sleeps,
// and those that are late.
func (k *Kernel) showReceivers(d *device) {
	if k.options.HideThreads {
		return
	}
	receivers, late := 0, 0
	if d.config != nil {
		receivers, late = max(0, len(d.config.sockets)-d.config.strand), d.config.late
	}
	first := firstReceiver + 100*d.index
	threads := strings.Fields(k.tree.read(threadList))
	threads = slices.DeleteFunc(threads, func(thread string) bool {
		n, err := strconv.Atoi(thread)
		ours := err == nil && n >= first && n < first+100
		if ours {
			k.tree.remove("proc", thread)
		}
		return ours
	})
	work := "nbd"
	if !k.atLeast(5, 14) {
		work = "knbd"
	}
	for n := range receivers + late {
		state := 'S'
		if n >= receivers {
			state = 'R'
		}
		thread, comm := itoa(first+n), fmt.Sprintf("kworker/u8:%d+%s%d-recv", n, work, d.index)
		k.tree.write(comm+"\n", "proc", thread, "comm")
		k.tree.write(fmt.Sprintf("%s (%s) %c 2 0 0 0 -1\n", thread, comm, state), "proc", thread, "stat")
		threads = append(threads, thread)
	}
	k.tree.write(strings.Join(threads, " "), threadList)
}
