package nbdnltest

import (
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

// maxQueued is how many events wait for a reader before they are dropped, as with a full socket.
const maxQueued = 256

// A ueventReader is an open uevent socket.
type ueventReader struct {
	kernel *Kernel
	events chan []byte
	lost   chan struct{} // has an element when events were dropped
	closed chan struct{}
	once   sync.Once
}

func (k *Kernel) openUevents() (io.ReadCloser, error) {
	r := &ueventReader{
		kernel: k,
		events: make(chan []byte, maxQueued),
		lost:   make(chan struct{}, 1),
		closed: make(chan struct{}),
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readers[r] = true
	return r, nil
}

// Read returns one event.
func (r *ueventReader) Read(p []byte) (int, error) {
	select {
	case e := <-r.events:
		return copy(p, e), nil
	case <-r.lost:
		return 0, syscall.ENOBUFS
	case <-r.closed:
		return 0, os.ErrClosed
	}
}

// overrun drops the events that wait, and makes Read say so.
func (r *ueventReader) overrun() {
	for len(r.events) > 0 {
		select {
		case <-r.events:
		default:
		}
	}
	select {
	case r.lost <- struct{}{}:
	default:
	}
}

// Close wakes Read.
func (r *ueventReader) Close() error {
	r.once.Do(func() {
		close(r.closed)
		r.kernel.mu.Lock()
		defer r.kernel.mu.Unlock()
		delete(r.kernel.readers, r)
	})
	return nil
}

// announce sends an event of a device, with more lines if there are any.
func (k *Kernel) announce(action string, index int, more ...string) {
	path := "/devices/virtual/block/" + name(index)
	event := fmt.Appendf(nil, "%s@%s\x00ACTION=%s\x00DEVPATH=%s\x00SUBSYSTEM=block\x00DEVNAME=%s\x00DEVTYPE=disk\x00",
		action, path, action, path, name(index))
	for _, line := range more {
		event = append(append(event, line...), 0)
	}
	for r := range k.readers {
		select {
		case r.events <- event:
		default:
			r.overrun()
		}
	}
}
