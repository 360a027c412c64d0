package nbd

import (
	"context"
	"net"
	"time"
)

// longAgo is a deadline that has the receiver look up from the network.
var longAgo = time.Unix(1, 0)

// A parking is that of the receiver of a connection, which then leaves to others what comes.
type parking struct {
	reached chan struct{} // closed by the receiver when it does not read any more
	held    int           // then, how many bytes it has of a reply
	over    chan struct{} // closed when it is to go on
}

// interrupted is called by the receiver when the deadline has woken it, with how many bytes it has
// of a reply. Either a caller has given up, or it is to park: then it returns when that is over.
func (k *conn) interrupted(held int) error {
	for {
		k.sending.Lock()
		p := k.parking
		if p == nil {
			err := k.NetConn.SetReadDeadline(time.Time{})
			k.sending.Unlock()
			return err
		}
		k.sending.Unlock()
		p.held = held
		close(p.reached)
		select {
		case <-p.over:
		case <-k.dead:
			return net.ErrClosed
		}
	}
}

// park has the connection stand still for another process: nothing is sent on it, and nothing is
// received, until resume or close. It reports whether that is so. If something is in flight, was
// received in part, or is still being sent when ctx ends, the connection goes on as it was.
// Requests that come meanwhile wait.
func (k *conn) park(ctx context.Context) bool {
	if !k.seize(ctx) {
		return false
	}
	p := &parking{reached: make(chan struct{}), over: make(chan struct{})}
	k.sending.Lock()
	k.parking = p
	// The lock keeps a receiver that a caller has woken just now from taking this deadline back.
	err := k.NetConn.SetReadDeadline(longAgo)
	k.sending.Unlock()
	if err == nil {
		select {
		case <-p.reached:
		case <-k.dead:
		}
	}
	k.sending.Lock()
	k.handed = err == nil && k.err == nil && p.held == 0
	handed := k.handed
	k.sending.Unlock()
	if !handed {
		k.resume()
	}
	return handed
}

// seize has nobody send, if that can be before ctx ends and nothing is in flight. It reports
// whether it is so.
func (k *conn) seize(ctx context.Context) bool {
	k.sending.Lock()
	defer k.sending.Unlock()
	for k.busy && k.err == nil {
		if k.rested == nil {
			k.rested = make(chan struct{})
		}
		rested := k.rested
		k.sending.Unlock()
		select { // Who has sent what was answered may still be about to notice.
		case <-rested:
		case <-k.dead:
		case <-ctx.Done():
		}
		k.sending.Lock()
		if ctx.Err() != nil {
			break
		}
	}
	if k.busy || k.err != nil || k.retired.Load() || k.inFlight.Load() > 0 {
		return false
	}
	k.busy = true
	return true
}

// resume ends what park has begun, whether or not that has succeeded.
func (k *conn) resume() {
	k.sending.Lock()
	defer k.sending.Unlock()
	k.handed = false
	if k.parking != nil {
		close(k.parking.over)
		k.parking = nil
	}
	if k.err != nil { // The helper may have gone.
		k.rest()
		k.drop()
		return
	}
	k.help <- struct{}{} // There is room for one, and only who is busy says so.
}

// away reports whether the connection was handed over.
func (k *conn) away() bool {
	k.sending.Lock()
	defer k.sending.Unlock()
	return k.handed
}
