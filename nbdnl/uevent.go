package nbdnl

import (
	"bytes"
	"errors"
	"io"
	"syscall"
)

// maxUevent is more than the kernel's buffer for one (UEVENT_BUFFER_SIZE is 2048).
const maxUevent = 8 << 10

// A uevent is what the kernel says of one change of a device.
type uevent struct {
	action string // "add", "change", "remove", …
	device string // the name of a block device: "nbd3"
}

// parseUevent reads a message of the kernel: "change@/devices/virtual/block/nbd3" and KEY=value
// lines, each ended by a zero byte. What is not such a message gives a zero uevent.
func parseUevent(b []byte) uevent {
	header, rest, _ := bytes.Cut(b, []byte{0})
	if !bytes.Contains(header, []byte("@/")) {
		return uevent{}
	}
	var e uevent
	for line := range bytes.SplitSeq(rest, []byte{0}) {
		key, value, _ := bytes.Cut(line, []byte("="))
		switch string(key) {
		case "ACTION":
			e.action = string(value)
		case "DEVNAME":
			e.device = string(value)
		}
	}
	return e
}

// A watcher passes on that something changed with a device, without saying what.
type watcher struct {
	source  io.ReadCloser
	changed chan struct{} // has room for one: changes that nobody has looked at yet are one
	done    chan struct{}
}

// watch starts to watch a device. Without uevents, as in a container that is not allowed to see
// them, it never reports a change, and who waits must look at intervals.
func (s *System) watch(index int) *watcher {
	w := &watcher{changed: make(chan struct{}, 1), done: make(chan struct{})}
	source, err := s.uevents()
	if err != nil {
		close(w.done)
		return w
	}
	w.source = source
	go w.run(name(index))
	return w
}

func (w *watcher) run(device string) {
	defer close(w.done)
	buf := make([]byte, maxUevent)
	for {
		n, err := w.source.Read(buf)
		if err != nil && !errors.Is(err, syscall.ENOBUFS) {
			return
		}
		// ENOBUFS: the kernel has dropped some, perhaps ours.
		if err == nil && parseUevent(buf[:n]).device != device {
			continue
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// close ends the watch.
func (w *watcher) close() {
	if w.source != nil {
		_ = w.source.Close() // wakes the read
	}
	<-w.done
}
