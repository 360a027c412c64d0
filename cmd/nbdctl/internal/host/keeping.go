package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/nbdnl"
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
	gone chan struct{} // closed when the keeper has ended
}

// keepable says whether somebody can go on with the device when this process has died.
func (h *Host) keepable(ctx context.Context, client *nbdnl.Client, device *blockdev.Device) (bool, error) {
	switch {
	case h.Spec.Restart == 0, h.record.Mode != nbdnl.ModeNetlink.String(), h.remote.direct():
		return false, nil
	}
	st, err := client.Status(ctx, device.Index())
	return st.HasIdentifier, err
}

// keep starts a keeper for the device, and gives it the estate. The keeper that there was before is
// not told.
func (h *Host) keep(ctx context.Context, client *nbdnl.Client, device *blockdev.Device) error {
	ok, err := h.keepable(ctx, client, device)
	if !ok || err != nil {
		return err
	}
	c, err := startKeeper()
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	return h.keepBy(c)
}

// keepBy gives the estate to the keeper at the other end of c.
func (h *Host) keepBy(c *net.UnixConn) error {
	e, err := h.estate()
	if err == nil {
		err = h.entrust(c, e)
		e.close()
	}
	if err != nil {
		c.Close()
		return fmt.Errorf("keeper: %w", err)
	}
	h.setKeeper(watchKeeper(c))
	return nil
}

// keeper is the connection to the keeper; nil: there is none.
func (h *Host) keeper() *keeping {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keeping
}

func (h *Host) setKeeper(k *keeping) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keeping = k
}

// entrust gives the keeper an estate, and waits until it has it.
func (h *Host) entrust(c *net.UnixConn, e *estate) error {
	if err := c.SetDeadline(time.Now().Add(keeperPatience)); err != nil {
		return err
	}
	if err := e.send(c); err != nil {
		return err
	}
	f, err := parcel.Receive(c, &struct{}{})
	closeFile(f)
	return errors.Join(err, c.SetDeadline(time.Time{}))
}

// estate is what the next process needs to have. The files are copies.
func (h *Host) estate() (*estate, error) {
	control, err := h.control.file()
	if err != nil {
		return nil, err
	}
	var backend []*os.File
	if h.backing.Keep != nil {
		if backend, err = h.backing.Keep(); err != nil {
			control.Close()
			return nil, err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	e, err := newEstate(&h.record, h.Spec.Secrets, control, backend)
	if err != nil {
		closeFiles(append(backend, control))
	}
	return e, err
}

// watchKeeper watches over a keeper that has the estate.
func watchKeeper(c *net.UnixConn) *keeping {
	k := &keeping{c, make(chan struct{})}
	go func() {
		defer close(k.gone)
		_, _ = io.Copy(io.Discard, c) // It says nothing.
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

// keepAgain replaces a keeper that has died. A handover is waited for: the next process has a
// keeper of its own, which takes the place of this one.
func (h *Host) keepAgain(ctx context.Context, client *nbdnl.Client, device *blockdev.Device) {
	changed, err := h.beginChange(ctx)
	if err != nil {
		return
	}
	defer changed()
	if handedOver(device) {
		return
	}
	if !h.keepers.take(h.Spec.Restart, time.Now()) {
		h.log.Error("the keeper has died again, and is not replaced any more", "limit", h.Spec.Restart,
			"within", restartWindow)
		return
	}
	h.log.Warn("the keeper has died, another one takes its place")
	if err := h.keep(ctx, client, device); err != nil {
		h.log.Error("there is no keeper", "error", err)
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
