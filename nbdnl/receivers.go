package nbdnl

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// How long the receivers of connections that died are waited for, before a socket takes the place
// of one and after.
const (
	// receiverPatience is for those that show, and are not seen at rest.
	receiverPatience = 500 * time.Millisecond
	// blindPatience takes its place where none shows. The receiver ends as soon as it gets a
	// processor, with the highest priority.
	blindPatience = 100 * time.Millisecond
	// startPatience is for the receivers of a device that was connected: threads are made for them,
	// one after the other.
	startPatience = time.Second
)

// receivers are the kernel's workers that receive from the connections of a device (recv_work), one
// for each connection.
//
// A worker whose connection has ended notices that when it runs next, and its last act is to
// declare the connection dead which is in the same place then (nbd_mark_nsock_dead): one that has
// taken the place meanwhile is shut down. Nothing that the driver shows tells that a worker has
// ended. But the name of a kernel thread shows the workqueue that it works for at the moment
// (wq_worker_comm), and its state shows whether it sleeps. Receiving is the only thing that a
// receiver does in an interruptible sleep: it waits for data or for the end of its connection. The
// end wakes it, before the place is free (kernel_sock_shutdown in nbd_mark_nsock_dead), and it
// never sleeps so again. So a receiver that is seen in such a sleep after the place was free has
// another connection, one that lives.
type receivers struct {
	sys   *System
	index int
	// visible is false in a PID namespace other than the initial one, where no kernel threads show.
	visible bool
	// restless are those that were not seen at rest yet, by their numbers; at first all.
	restless []string
}

// receivers looks for the receivers of the device.
func (s *System) receivers(index int) *receivers {
	r := &receivers{sys: s, index: index}
	// All kernel threads are children of the second process (rest_init).
	name, err := machine.ReadAttribute(s.path("proc/2/comm"))
	if err != nil || string(name) != "kthreadd\n" {
		return r
	}
	threads, err := s.threads()
	if err != nil {
		return r // the kernel is built without it (CONFIG_PROC_CHILDREN)
	}
	r.visible = true
	for thread := range strings.FieldsSeq(string(threads)) {
		if r.receives(thread) {
			r.restless = append(r.restless, thread)
		}
	}
	return r
}

// threads lists the numbers of the kernel's threads. There may be more than fit into one read.
func (s *System) threads() ([]byte, error) { return os.ReadFile(s.path("proc/2/task/2/children")) }

// receives reports whether the thread is at work for the device's workqueue, "knbd3-recv" in Linux
// 5.10 and "nbd3-recv" since.
func (r *receivers) receives(thread string) bool {
	comm, err := machine.ReadAttribute(r.sys.path("proc", thread, "comm"))
	if err != nil {
		return false // it has ended
	}
	_, work, _ := bytes.Cut(comm, []byte("+"))
	return string(bytes.TrimPrefix(work, []byte("k"))) == "nbd"+strconv.Itoa(r.index)+"-recv\n"
}

// sleeps reports whether the thread is in an interruptible sleep.
func (r *receivers) sleeps(thread string) bool {
	stat, err := machine.ReadAttribute(r.sys.path("proc", thread, "stat"))
	name := bytes.LastIndexByte(stat, ')') // the state follows, proc_pid_stat(5)
	return err == nil && bytes.HasPrefix(stat[name+1:], []byte(" S "))
}

// settled looks again at those that were not seen at rest, and reports whether none is left.
func (r *receivers) settled() bool {
	var rest []string
	for _, thread := range r.restless {
		if r.receives(thread) && !r.sleeps(thread) {
			rest = append(rest, thread)
		}
	}
	r.restless = rest
	return r.visible && len(rest) == 0
}

// settle returns when no receiver of the device can be on its way out, as far as that shows and
// within reason, or when over says so. Where receivers do not show it takes as long as blind says.
// The error is that of ctx.
func (s *System) settle(ctx context.Context, index int, blind time.Duration, over func() bool) error {
	r, limit := s.receivers(index), receiverPatience
	if !r.visible {
		limit = blind
	}
	pause := backoff.New()
	defer pause.Stop()
	for begin := time.Now(); !r.settled() && !over() && time.Since(begin) < limit; {
		if err := pause.Wait(ctx, nil); err != nil {
			return err
		}
	}
	return nil
}

// WaitReceivers returns when the kernel receives from all n connections of the device that was just
// connected, or an error that matches ErrStranded when it will not, after a second. Where the
// kernel's threads do not show, as in a container, it can't tell, and returns at once without an
// error. Of a single connection there is nothing to fear.
//
// With Linux 5.10 and 6.1, and up to some 6.12, receivers may never start. When the kernel takes
// more than ten milliseconds to make a thread, the reserve of the workqueue takes over all
// receivers that have none yet, and executes them one after the other (rescuer_thread, until
// assign_rescuer_work came); but the first goes on for as long as its connection lives. The replies
// on the connections of the others stay unread, and their requests hang until their timeout. That
// happens to the first devices with several connections on a busy machine. The remedy is to
// disconnect such a device, which nobody uses yet, and to connect it again: by then there are
// threads.
func (c *Client) WaitReceivers(ctx context.Context, index, n int) error {
	pause := backoff.New()
	defer pause.Stop()
	for begin := time.Now(); ; {
		r := c.sys.receivers(index)
		if !r.visible || len(r.restless) >= n {
			return nil
		}
		if time.Since(begin) >= startPatience {
			return newError("wait for receivers of", index, fmt.Errorf("%w: %d of %d", ErrStranded, len(r.restless), n))
		}
		if err := pause.Wait(ctx, nil); err != nil {
			return newError("wait for receivers of", index, err)
		}
	}
}
