package server

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// In each journalPeriod a journal writes journalRecords of each trouble, and how many there
	// were beside these: a dying disk fails as many requests as it is asked, and whoever reads the
	// log, or has it on the next disk, wants no more than that.
	journalRecords = 10
	journalPeriod  = 10 * time.Second
	// journalQueue is how many records wait for a log that takes its time.
	journalQueue = 4 * journalRecords
)

// A trouble is what a record in the log is about. Each has its own share of the log, so that none
// drowns another.
type trouble int

const (
	troubleFailed    trouble = iota // of a request, by the backend
	troubleRefused                  // of a request that never reached the backend
	troubleSlow                     // of a request that took long, and succeeded
	troubleHandshake                // of a client that did not come to an export
	troubleClient                   // of a client that had one
	troubles                        // how many there are
)

func (t trouble) String() string {
	return [troubles]string{"failed", "refused", "slow", "handshake", "connection"}[t]
}

// ofClient reports whether the trouble is not that of a request.
func (t trouble) ofClient() bool { return t == troubleHandshake || t == troubleClient }

// An event is a request that goes into the log, or a client.
type event struct {
	trouble trouble
	request wire.Request
	client  string // its address
	err     error  // nil if it succeeded
	time    time.Time
	took    time.Duration

	more int // if not 0, the event stands for that many, and has nothing else but trouble and time
}

// A journal writes what goes wrong into the log. Nobody waits for the log: it may be slow, and it
// may lie on the very device whose requests it tells of. Safe for concurrent use.
type journal struct {
	log *slog.Logger // nil: there is none

	mu      sync.Mutex // guards all below
	counts  [troubles]journalCount
	period  bool // has begun, and a timer is going to end it
	queue   []event
	writing bool // somebody is, and will see what is in the queue
}

// journalCount is what has become of the events of one trouble in the current period.
type journalCount struct {
	written, left int
}

// note has an event written, or counted where that would be too many.
func (j *journal) note(e event) {
	if j.log == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.period {
		j.period = true
		time.AfterFunc(journalPeriod, j.turn)
	}
	if c := &j.counts[e.trouble]; c.written == journalRecords || j.full() {
		c.left++
	} else {
		c.written++
		j.enqueue(e)
	}
}

// turn ends a period. What cannot be told yet makes the beginning of the next one.
func (j *journal) turn() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.period = false
	for t := range j.counts {
		c := &j.counts[t]
		c.written = 0
		if c.left > 0 && !j.full() {
			j.enqueue(event{trouble: trouble(t), time: time.Now(), more: c.left})
			c.left = 0
		}
		j.period = j.period || c.left > 0
	}
	if j.period {
		time.AfterFunc(journalPeriod, j.turn)
	}
}

func (j *journal) full() bool { return len(j.queue) >= journalQueue }

// enqueue has an event written. The caller holds the lock.
func (j *journal) enqueue(e event) {
	j.queue = append(j.queue, e)
	if !j.writing {
		j.writing = true
		go j.write()
	}
}

// write writes until the queue is empty.
func (j *journal) write() {
	for {
		j.mu.Lock()
		queue := j.queue
		j.queue = nil
		j.writing = len(queue) > 0
		j.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		for i := range queue {
			queue[i].writeTo(j.log.Handler())
		}
	}
}

// writeTo writes the event as a record with its own time.
func (e *event) writeTo(log slog.Handler) {
	level, text := slog.LevelWarn, "request failed"
	switch {
	case e.more > 0 && e.trouble.ofClient():
		text = "more clients than are logged"
	case e.more > 0:
		text = "more requests than are logged"
	case e.trouble.ofClient():
		text = e.trouble.String() + " failed"
	case e.trouble == troubleFailed:
		level = slog.LevelError
	case e.trouble == troubleSlow:
		text = "slow request"
	}
	if !log.Enabled(context.Background(), level) {
		return
	}
	r := slog.NewRecord(e.time, level, text, 0)
	switch {
	case e.more > 0:
		r.AddAttrs(slog.String("which", e.trouble.String()), slog.Int("more", e.more))
	case e.trouble.ofClient():
		r.AddAttrs(slog.String("client", e.client))
	default:
		h := e.request
		r.AddAttrs(slog.String("op", h.Command.String()), slog.Uint64("offset", h.Offset), slog.Uint64("length", uint64(h.Length)),
			slog.Uint64("errno", uint64(wire.ErrnoOf(e.err))), slog.Duration("took", e.took))
	}
	if e.err != nil {
		r.AddAttrs(slog.Any("err", e.err))
	}
	if p, ok := e.err.(*panicError); ok {
		r.AddAttrs(slog.String("stack", string(p.stack)))
	}
	_ = log.Handle(context.Background(), r) // There is nobody else to tell.
}
