package blockdev

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// errNotSeen is all that is known of the end of a connection that is not seen here.
var errNotSeen = errors.New("the kernel tells that a connection has died, and it may be this one")

// unseenPatience is how long the kernel may take to notice the death of a connection before another
// one in its place, until the one that is not seen is taken for alive. That is found out if the
// kernel takes longer.
const unseenPatience = time.Second

// unseen are those connections of a device of ConnectRemote that the kernel has and nobody here:
// who has dialled them is dead, and no descriptor of them was kept. That such a connection is alive
// shows by the kernel, which drops another one in its place; that it may have died, by what the
// kernel tells of the device. Safe for concurrent use. A nil *unseen is of a device that has none.
type unseen struct {
	device *Device

	mu        sync.Mutex // guards all below
	listening bool
	heard     int                   // how often the kernel has told of something
	alive     map[*watched]struct{} // that stand in for those connections
}

func newUnseen(d *Device) *unseen {
	return &unseen{device: d, alive: make(map[*watched]struct{})}
}

// listen has what the kernel tells heard from now on, and returns how often it has told something.
func (u *unseen) listen() (heard int, err error) {
	if u == nil {
		return 0, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.listening {
		// It ends when no connection is to be replaced any more.
		w, err := u.device.client.Watch(u.device.conns.reconnecting)
		if err != nil {
			return 0, fmt.Errorf("blockdev: %s: %w", u.device.Path(), err)
		}
		u.listening = true
		go u.hear(w)
	}
	return u.heard, nil
}

// hear takes each connection for dead that may be, and, when there is nothing to be heard any more,
// all. They are listened for again then.
func (u *unseen) hear(w *nbdnl.Watch) {
	defer w.Close()
	for {
		e, err := w.Next()
		switch {
		case err != nil:
			u.suspect(false)
			return
		case e.Index != u.device.index:
		case e.Kind == nbdnl.EventLinkDead, e.Kind == nbdnl.EventDisconnect, e.Kind == nbdnl.EventRemove:
			u.suspect(true)
		}
	}
}

// suspect takes all for dead. Those that are not will be found alive.
func (u *unseen) suspect(listening bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.listening = listening
	u.heard++
	for w := range u.alive {
		close(w.hungUp)
	}
	clear(u.alive)
}

// find returns what stands in for a connection that was found alive since heard was what listen has
// returned.
func (u *unseen) find(heard int) *watched {
	w := &watched{unseen: true, ends: u.device.ends, hungUp: make(chan struct{}), closed: make(chan struct{})}
	w.stop = func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.alive, w)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.heard != heard {
		close(w.hungUp) // It may have died since.
	} else {
		u.alive[w] = struct{}{}
	}
	return w
}

// isUnseen reports whether t stands in for a connection that is not seen here.
func isUnseen(t transmitter) bool {
	w, ok := t.(*watched)
	return ok && w.unseen
}
