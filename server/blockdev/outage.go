package blockdev

import "time"

// An Outage is how a device is connected.
type Outage struct {
	// Alive is how many connections are; Replaced is how many were, so far.
	Alive    int
	Replaced int64
	// Since is when the last of them was lost; zero while any is alive.
	Since time.Time
	// Err is why the last attempt to replace one has failed, or before that, why it was lost; nil
	// if all are alive.
	Err error
}

// Outage returns how the device is connected. Changes tells when that has changed.
func (d *Device) Outage() Outage { return d.conns.outage() }

// gap returns for how long there has been no connection for the kernel, at the most, if there is
// none. The caller holds mu.
func (cs *connections) gap() time.Duration { return time.Since(cs.lastDeath()) }

// lastDeath is since when. The caller holds mu.
func (cs *connections) lastDeath() (last time.Time) {
	for _, c := range cs.all {
		if c.dead.After(last) {
			last = c.dead
		}
	}
	return last
}

// failed notes that a dead connection was not replaced yet.
func (cs *connections) failed(err error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.failing == nil || cs.failing.Error() != err.Error() {
		cs.failing = err
		cs.changed()
	}
}

// leave notes that the device is disconnected, where no connection tells.
func (cs *connections) leave() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.goodbye = true
	cs.retire()
}

// outage returns how the device is connected (Device.Outage).
func (cs *connections) outage() Outage {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	o := Outage{Alive: cs.alive, Replaced: cs.replaced, Err: cs.failing}
	if o.Err == nil {
		o.Err = cs.lost
	}
	if cs.alive == 0 {
		o.Since = cs.lastDeath()
	}
	return o
}
