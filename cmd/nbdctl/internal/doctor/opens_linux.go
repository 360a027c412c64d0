package doctor

import (
	"encoding/binary"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// opens counts how often a file is opened.
type opens struct {
	events *os.File
	seen   chan int
}

// watchOpens begins to count. Each time the file has been opened opened is
// called, in a goroutine that ends with stop.
func watchOpens(path string, opened func()) (*opens, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	o := &opens{events: os.NewFile(uintptr(fd), "inotify"), seen: make(chan int, 1)}
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN); err != nil {
		return nil, errors.Join(&os.PathError{Op: "inotify_add_watch", Path: path, Err: err}, o.events.Close())
	}
	go func() {
		n := 0
		buf := make([]byte, 4096)
		for {
			length, err := o.events.Read(buf)
			if err != nil {
				o.seen <- n
				return
			}
			n += countEvents(buf[:length])
			opened()
		}
	}()
	return o, nil
}

// countEvents counts the events of inotify(7) in buf.
func countEvents(buf []byte) (n int) {
	for len(buf) >= unix.SizeofInotifyEvent {
		// wd, mask, cookie and len, four bytes each, then the name.
		name := binary.NativeEndian.Uint32(buf[12:])
		if binary.NativeEndian.Uint32(buf[4:])&unix.IN_OPEN != 0 {
			n++
		}
		buf = buf[min(len(buf), unix.SizeofInotifyEvent+int(name)):]
	}
	return n
}

// stop goes on counting for some time, or not at all if err is not nil, and
// returns the number, and err.
func (o *opens) stop(after time.Duration, err error) (int, error) {
	if err != nil {
		after = 0
	}
	deadlineErr := o.events.SetReadDeadline(time.Now().Add(after))
	if deadlineErr != nil {
		// It would never end otherwise.
		deadlineErr = errors.Join(deadlineErr, o.events.Close())
		<-o.seen
		return 0, errors.Join(err, deadlineErr)
	}
	n := <-o.seen
	return n, errors.Join(err, o.events.Close())
}
