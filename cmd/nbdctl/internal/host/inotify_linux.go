package host

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// whatAppears and whatGoes are the events of a directory that a watcher asks for. Records are
	// renamed into their places. What is written into a file that is there already, a log for one,
	// is of no interest.
	whatAppears = unix.IN_CREATE | unix.IN_MOVED_TO
	whatGoes    = unix.IN_DELETE | unix.IN_MOVED_FROM
	// eventsSize is room for some hundred events in bytes, and for one whatever its name
	// (inotify(7)).
	eventsSize = 16 << 10
)

// A watcher tells of changes in directories, by inotify(7).
type watcher struct {
	file   *os.File // the inotify instance
	events [eventsSize]byte
}

func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	return &watcher{file: os.NewFile(uintptr(fd), "inotify")}, nil // which the runtime's poller waits for
}

// add watches a directory, until it is removed. To add it again changes nothing.
func (w *watcher) add(dir string) error {
	return withDescriptor(w.file, func(fd uintptr) error {
		_, err := unix.InotifyAddWatch(int(fd), dir, whatAppears|whatGoes|unix.IN_ONLYDIR)
		return err
	})
}

// next waits for changes, and tells whether anything may have appeared. After close it fails.
func (w *watcher) next() (appeared bool, err error) {
	n, err := w.file.Read(w.events[:])
	if err != nil {
		return false, err
	}
	return appears(w.events[:n]), nil
}

// appears tells whether anything may have appeared by these events.
func appears(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		// struct inotify_event: wd, mask, cookie and len, of 4 bytes each, and then len bytes of a
		// name.
		mask := binary.NativeEndian.Uint32(events[4:])
		// After an overflow nobody knows what was dropped.
		if mask&(whatAppears|unix.IN_Q_OVERFLOW) != 0 {
			return true
		}
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		events = events[min(size, len(events)):]
	}
	return false
}

func (w *watcher) close() error { return w.file.Close() }
