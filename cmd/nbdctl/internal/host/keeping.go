package host

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const (
	// restartWindow is the time in which a process may be replaced Spec.Restart times.
	restartWindow = 10 * time.Minute
	// keeperPatience bounds what a keeper may take to answer, or to end.
	keeperPatience = 10 * time.Second
)

// A keeping is a serving process's connection to its keeper.
type keeping struct {
	conn *net.UnixConn
	has  chan struct{} // has an element for each estate that the keeper has taken
	gone chan struct{} // closed when the keeper has ended

	mu       sync.Mutex // held while an estate is sent
	replaced int64      // connections of the device, when that was
}

// watchKeeper watches over the keeper at the other end of c.
func watchKeeper(c *net.UnixConn) *keeping {
	k := &keeping{conn: c, has: make(chan struct{}, 1), gone: make(chan struct{})}
	go func() {
		defer close(k.gone)
		for {
			f, err := parcel.Receive(c, &struct{}{})
			closeFile(f)
			if err != nil {
				return
			}
			select {
			case k.has <- struct{}{}:
			default: // Nobody waits any more.
			}
		}
	}()
	return k
}

// ended is closed when the keeper has ended; nil: there is none.
func (k *keeping) ended() <-chan struct{} {
	if k == nil {
		return nil
	}
	return k.gone
}

// leave leaves the keeper to another process.
func (k *keeping) leave() {
	if k != nil {
		k.conn.Close()
	}
}

// entrust gives the keeper an estate, and waits until it has it. The caller holds mu.
func (k *keeping) entrust(e *estate) error {
	if err := k.conn.SetWriteDeadline(time.Now().Add(keeperPatience)); err != nil {
		return err
	}
	if err := e.send(k.conn); err != nil {
		return err
	}
	late := time.NewTimer(keeperPatience)
	defer late.Stop()
	select {
	case <-k.has:
		return nil
	case <-k.gone:
		return errors.New("it has ended")
	case <-late.C:
		return fmt.Errorf("it has not answered within %s", keeperPatience)
	}
}

// hasAll reports whether the keeper has all connections of the device. While it is being given some
// it has not.
func (k *keeping) hasAll(device *blockdev.Device) bool {
	if !k.mu.TryLock() {
		return false
	}
	defer k.mu.Unlock()
	return k.replaced == device.Outage().Replaced
}

// release has the keeper end, and waits for that: it holds what the backend has locked.
func (k *keeping) release() error {
	if k == nil {
		return nil
	}
	defer k.conn.Close()
	if err := parcel.Send(k.conn, will{Released: true}, nil); err != nil {
		return nil // It has ended.
	}
	late := time.NewTimer(keeperPatience)
	defer late.Stop()
	select {
	case <-k.gone:
		return nil
	case <-late.C:
		return fmt.Errorf("the keeper has not ended within %s", keeperPatience)
	}
}

// A budget says how often something may be done within restartWindow.
type budget struct{ times []time.Time }

// take reports whether it may be done once more, and counts that.
func (b *budget) take(limit int, now time.Time) bool {
	for len(b.times) > 0 && now.Sub(b.times[0]) > restartWindow {
		b.times = b.times[1:]
	}
	if len(b.times) >= limit {
		return false
	}
	b.times = append(b.times, now)
	return true
}
