// Package loglimit writes events of certain sorts into a log: of each sort some, and then how many
// others there were.
//
// A dying disk fails as many requests as it is asked, and whoever reads the log, or has it on the
// next disk, wants no more than that. Nobody waits for the log: it may be slow, and it may lie on
// the very device whose requests it tells of.
package loglimit

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// Records is how many events of each sort are written in each Period.
	Records = 10
	// Period is how long it takes until the next ones are.
	Period = 10 * time.Second
	// queueLength is how many records wait for a log that takes its time.
	queueLength = 4 * Records
)

// A Limiter writes into a log. Safe for concurrent use.
type Limiter struct {
	handler slog.Handler // nil: there is no log
	more    func(sort, n int) slog.Record

	mu      sync.Mutex // guards all below
	counts  []count    // by sort
	period  bool       // has begun, and a timer is going to end it
	queue   []slog.Record
	writing bool // somebody is, and will see what is in the queue
}

// A count is what has become of the events of one sort in the current period.
type count struct {
	written, left int
}

// New returns a limiter for events of sorts from 0 to sorts-1, each of which has its own share of
// the log, so that none drowns another. more makes the record that stands for n events which were
// not written. Without a log nothing is.
func New(log *slog.Logger, sorts int, more func(sort, n int) slog.Record) *Limiter {
	l := &Limiter{more: more, counts: make([]count, sorts)}
	if log != nil {
		l.handler = log.Handler()
	}
	return l
}

// Note has an event written, or counted where that would be too many. record makes its record, with
// the event's own time. It is called before Note returns, or never, and must not block.
func (l *Limiter) Note(sort int, record func() slog.Record) {
	if l.handler == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.period {
		l.period = true
		time.AfterFunc(Period, l.turn)
	}
	if c := &l.counts[sort]; c.written == Records || l.full() {
		c.left++
	} else {
		c.written++
		l.enqueue(record())
	}
}

// turn ends a period. What cannot be told yet makes the beginning of the next one.
func (l *Limiter) turn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.period = false
	for sort := range l.counts {
		c := &l.counts[sort]
		c.written = 0
		if c.left > 0 && !l.full() {
			l.enqueue(l.more(sort, c.left))
			c.left = 0
		}
		l.period = l.period || c.left > 0
	}
	if l.period {
		time.AfterFunc(Period, l.turn)
	}
}

func (l *Limiter) full() bool { return len(l.queue) >= queueLength }

// enqueue has a record written. The caller holds mu.
func (l *Limiter) enqueue(r slog.Record) {
	l.queue = append(l.queue, r)
	if !l.writing {
		l.writing = true
		go l.write()
	}
}

// write writes until the queue is empty.
func (l *Limiter) write() {
	for {
		l.mu.Lock()
		queue := l.queue
		l.queue = nil
		l.writing = len(queue) > 0
		l.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		for _, r := range queue {
			if l.handler.Enabled(context.Background(), r.Level) {
				_ = l.handler.Handle(context.Background(), r) // There is nobody else to tell.
			}
		}
	}
}
