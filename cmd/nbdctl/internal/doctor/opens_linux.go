package doctor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// opens counts how often other processes open a file.
type opens struct {
	events *os.File
	done   chan struct{} // closed when who is complete
	who    map[string]int
}

// watchOpens begins to count, which on /dev is possible from Linux 5.13 on.
func watchOpens(path string) (*opens, error) {
	// Without file handles, fanotify tells of regular files and directories only.
	const flags = unix.FAN_REPORT_FID | unix.FAN_CLASS_NOTIF | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK
	fd, err := unix.FanotifyInit(flags, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fanotify_init", err)
	}
	o := &opens{events: os.NewFile(uintptr(fd), "fanotify"), done: make(chan struct{}), who: make(map[string]int)}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN, unix.AT_FDCWD, path); err != nil {
		return nil, errors.Join(&os.PathError{Op: "fanotify_mark", Path: path, Err: err}, o.events.Close())
	}
	go o.count()
	return o, nil
}

func (o *opens) count() {
	defer close(o.done)
	buf := make([]byte, 4096)
	for {
		n, err := o.events.Read(buf)
		if err != nil {
			break
		}
		o.note(buf[:n])
	}
	// On a busy machine the time may be over before this goroutine had its turn: a deadline that
	// has passed also hides what has come before it.
	raw, err := o.events.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for range 64 { // Somebody may go on opening it.
			n, err := unix.Read(int(fd), buf)
			if n <= 0 || err != nil {
				return
			}
			o.note(buf[:n])
		}
	})
}

func (o *opens) note(events []byte) {
	for _, pid := range openedBy(events) {
		if pid != os.Getpid() {
			o.who[processName(pid)]++
		}
	}
}

// eventSize is that of struct fanotify_event_metadata (fanotify(7)).
const eventSize = 24

// openedBy returns the processes of the events in buf.
func openedBy(buf []byte) (pids []int) {
	for len(buf) >= eventSize {
		length := int(binary.NativeEndian.Uint32(buf))
		pids = append(pids, int(int32(binary.NativeEndian.Uint32(buf[20:]))))
		if length < eventSize || length > len(buf) {
			break
		}
		buf = buf[length:]
	}
	return pids
}

// processName names a process, which may be gone already or, with the number
// 0, in a pid namespace that can't be seen from here.
func processName(pid int) string {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	switch {
	case pid == 0:
		return "a process outside of this container"
	case err != nil:
		return "a process that is gone"
	}
	return fmt.Sprintf("%s (pid %d)", strings.TrimSpace(string(comm)), pid)
}

// stop goes on counting for some time and returns how often each process has
// opened the file.
func (o *opens) stop(after time.Duration) (map[string]int, error) {
	if err := o.events.SetReadDeadline(time.Now().Add(after)); err != nil {
		err = errors.Join(err, o.events.Close())
		<-o.done
		return nil, err
	}
	<-o.done
	return o.who, o.events.Close()
}
