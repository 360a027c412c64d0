package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

const (
	// blindPause is the time between two looks at all devices where the kernel's uevents can't be
	// had.
	blindPause = 2 * time.Second
	// joinPatience bounds the command that it takes to hear of deaths.
	joinPatience = time.Second
	// settlePatience is how long a device without a size is taken to be on its way up or down.
	settlePatience = 2 * time.Second
)

// A Watch follows the devices of the machine. Close must be called, Next by one goroutine at a
// time.
type Watch struct {
	client *Client
	ctx    context.Context
	cancel context.CancelCauseFunc
	events *eventQueue
	blind  bool // there are no uevents
	deaths deathSource
	deaf   bool // the driver may have come anew, so that deaths is to join again

	sources []io.Closer
	readers sync.WaitGroup
	closing sync.Once

	start     []Status
	seen      map[int]sight // devices as they were reported
	dead      map[int]bool  // devices whose dead connections are not reported
	unsettled map[int]time.Time
	queue     []Event
	pause     *backoff.Backoff // between looks at unsettled devices
}

// Watch begins to follow the devices, those of other programs too, until ctx ends. It needs no
// privilege.
//
// The kernel tells of a change without saying which, and Watch looks. What is undone before it
// looks, or before Next is called, may not show. Connections that die are told of in the initial
// network namespace only, and opens of devices not at all. In a user namespace other than the
// initial one there may be no uevents: there Watch looks at all devices every two seconds.
func (c *Client) Watch(ctx context.Context) (*Watch, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &Watch{
		client: c, ctx: ctx, cancel: cancel,
		events: newEventQueue(), pause: backoff.New(),
		seen: make(map[int]sight), dead: make(map[int]bool), unsettled: make(map[int]time.Time),
	}
	// What happens from here on is queued, and so is not lost after the first look.
	err := w.subscribe()
	if err == nil {
		err = w.lookFirst()
	}
	if err != nil {
		w.Close()
		return nil, newError("watch", anyIndex, err)
	}
	return w, nil
}

// Devices returns the devices that were connected when the watch began, by ascending index. Next
// tells what has happened since.
func (w *Watch) Devices() []Status { return slices.Clone(w.start) }

// Next waits for the next event. The error is the cause of the end of the context given to Watch,
// or os.ErrClosed after Close, or says why the watch can't go on. After any other one, Next can be
// called again, and loses nothing.
func (w *Watch) Next() (Event, error) {
	for len(w.queue) == 0 {
		all, err := w.wait()
		if err != nil {
			return Event{}, newError("watch", anyIndex, err)
		}
		if err := w.look(all); err != nil {
			w.events.changeAll() // what was queued is to be looked at still
			return Event{}, newError("watch", anyIndex, err)
		}
	}
	e := w.queue[0]
	w.queue = w.queue[1:]
	return e, nil
}

// Close ends the watch, and makes Next return.
func (w *Watch) Close() {
	w.closing.Do(func() {
		w.cancel(os.ErrClosed)
		for _, s := range w.sources {
			_ = s.Close() // wakes its reader
		}
		w.readers.Wait()
	})
}

// subscribe opens what the kernel says and begins to queue it.
func (w *Watch) subscribe() error {
	c := w.client
	if err := c.reach(w.ctx); err != nil {
		return err
	}
	deaths, err := do(w.ctx, c.limit, c.driver.deaths, func(d deathSource, err error) {
		if err == nil {
			_ = d.Close()
		}
	})
	if err != nil {
		return err
	}
	w.deaths = deaths
	w.read(deaths, func() error {
		index, err := deaths.Read()
		if err == nil && index != anyIndex {
			w.events.death(index)
		}
		return err
	})
	uevents, err := c.sys.uevents()
	w.blind = err != nil || c.sys.userNamespaced()
	if err != nil {
		return nil
	}
	buf := make([]byte, maxUevent)
	w.read(uevents, func() error {
		n, err := uevents.Read(buf)
		if err != nil {
			return err
		}
		e := parseUevent(buf[:n])
		if index, ok := names.Index(e.device); ok {
			w.events.change(index, e.action == "add")
		}
		return nil
	})
	return nil
}

// read calls next until the source fails or is closed.
func (w *Watch) read(source io.Closer, next func() error) {
	w.sources = append(w.sources, source)
	w.readers.Go(func() {
		for {
			err := next()
			switch {
			case errors.Is(err, syscall.ENOBUFS):
				w.events.changeAll() // the kernel has dropped some
			case err != nil:
				w.cancel(fmt.Errorf("the kernel's events have ended: %w", err))
				return
			}
		}
	})
}

// wait returns when there may be something to see, and whether to look at all devices.
func (w *Watch) wait() (all bool, err error) {
	if err := context.Cause(w.ctx); err != nil {
		return false, err
	}
	if len(w.unsettled) > 0 {
		return false, w.pause.Wait(w.ctx, w.events.wake)
	}
	var tick <-chan time.Time
	if w.blind {
		timer := time.NewTimer(blindPause)
		defer timer.Stop()
		tick = timer.C
	}
	select {
	case <-w.events.wake:
	case <-tick:
		all = true
	case <-w.ctx.Done():
		err = context.Cause(w.ctx)
	}
	return all, err
}

// lookFirst takes stock of the devices that are there.
func (w *Watch) lookFirst() error {
	indexes, err := w.client.sysfs.Indexes()
	if err != nil {
		return err
	}
	for _, index := range indexes {
		s, err := w.sight(index)
		if err != nil {
			return err
		}
		if !s.exists {
			continue
		}
		if settling(s) {
			w.unsettled[index] = time.Now()
			s = idle(index)
		}
		w.seen[index] = s
		if s.use.Connected {
			w.start = append(w.start, s.status)
		}
	}
	return nil
}

// look looks at the devices of which there is something new, or at all.
func (w *Watch) look(all bool) error {
	queued := w.events.take()
	maps.Copy(w.dead, queued.dead)
	due := slices.Collect(maps.Keys(queued.changed))
	due = slices.AppendSeq(due, maps.Keys(w.dead))
	due = slices.AppendSeq(due, maps.Keys(w.unsettled))
	if all || queued.all {
		indexes, err := w.client.sysfs.Indexes()
		if err != nil {
			return err
		}
		due = slices.AppendSeq(append(due, indexes...), maps.Keys(w.seen))
	}
	w.deaf = w.deaf || queued.all || queued.added
	if err := w.join(); err != nil {
		return err
	}
	slices.Sort(due)
	for _, index := range slices.Compact(due) {
		if err := w.lookAt(index); err != nil {
			return err
		}
	}
	return nil
}

// join makes sure that deaths are heard of. Devices are added by the module when it is loaded, and
// one by one by a connect.
func (w *Watch) join() error {
	if !w.deaf {
		return nil
	}
	// Whoever is stuck in the kernel must not keep the watch from what sysfs shows.
	ctx, cancel := context.WithTimeout(w.ctx, joinPatience)
	defer cancel()
	_, err := do(ctx, w.client.limit, func() (struct{}, error) { return struct{}{}, w.deaths.Join() }, nil)
	if errors.Is(err, ErrNoDriver) {
		err = nil // it has gone since, and announces itself when it comes back
	}
	w.deaf = err != nil
	if ctx.Err() != nil && w.ctx.Err() == nil {
		return nil // and the next look tries again
	}
	return err
}

// lookAt looks at one device and queues what has happened to it, unless that is still going on.
func (w *Watch) lookAt(index int) error {
	after, err := w.sight(index)
	if err != nil {
		return err
	}
	if settling(after) {
		since, ok := w.unsettled[index]
		if !ok {
			since = time.Now()
			w.unsettled[index] = since
			w.pause.Reset()
		}
		if time.Since(since) < settlePatience {
			return nil
		}
	}
	delete(w.unsettled, index)
	before, ok := w.seen[index]
	if !ok {
		before = none(index)
	}
	events := changes(before, after, w.dead[index])
	delete(w.dead, index)
	for i := range events {
		events[i].Time = time.Now()
	}
	w.queue = append(w.queue, events...)
	if w.seen[index] = after; !after.exists {
		delete(w.seen, index)
	}
	return nil
}

// settling reports whether the device is about to become connected or idle: `pid` comes before the
// size, and goes after it and after the uevent (nbd_start_device, nbd_config_put).
func settling(s sight) bool { return s.use.Connected && s.status.Size == 0 }

// sight looks at an index.
func (w *Watch) sight(index int) (sight, error) {
	s, use, err := w.client.look(index)
	if errors.Is(err, os.ErrNotExist) {
		return none(index), nil
	}
	return sight{exists: true, use: use, status: s}, err
}
