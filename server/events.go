package server

import (
	"log/slog"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/loglimit"
	"github.com/nbdctl/nbdctl/server/wire"
)

// The sorts of events that go into the log.
const (
	eventFailed    = iota // a request, in the backend
	eventRefused          // a request that never reached the backend
	eventSlow             // a request that took long, and succeeded
	eventHandshake        // a client that did not come to an export
	eventClient           // a client that had one
	events                // how many there are
)

var eventNames = [events]string{"failed", "refused", "slow", "handshake", "connection"}

// ofClient reports whether events of that sort are not requests.
func ofClient(sort int) bool { return sort == eventHandshake || sort == eventClient }

// newEvents returns where events are noted.
func newEvents(log *slog.Logger) *loglimit.Limiter {
	return loglimit.New(log, events, func(sort, n int) slog.Record {
		text := "more requests than are logged"
		if ofClient(sort) {
			text = "more clients than are logged"
		}
		r := slog.NewRecord(time.Now(), slog.LevelWarn, text, 0)
		r.AddAttrs(slog.String("which", eventNames[sort]), slog.Int("more", n))
		return r
	})
}

// requestRecord tells of a request that failed, or was slow: err is its outcome, of now.
func requestRecord(sort int, h wire.Request, err error, now time.Time, took time.Duration) slog.Record {
	level, text := slog.LevelWarn, "request failed"
	switch sort {
	case eventFailed:
		level = slog.LevelError
	case eventSlow:
		text = "slow request"
	}
	r := slog.NewRecord(now, level, text, 0)
	r.AddAttrs(
		slog.String("op", h.Command.String()),
		slog.Uint64("offset", h.Offset),
		slog.Uint64("length", h.Length),
		slog.Uint64("errno", uint64(wire.ErrnoOf(err))),
		slog.Duration("took", took),
	)
	if err != nil {
		r.AddAttrs(slog.Any("err", err))
	}
	if p, ok := err.(*panicError); ok {
		r.AddAttrs(slog.String("stack", string(p.stack)))
	}
	return r
}

// clientRecord tells of a client whose connection has failed.
func clientRecord(sort int, client string, err error) slog.Record {
	r := slog.NewRecord(time.Now(), slog.LevelWarn, eventNames[sort]+" failed", 0)
	r.AddAttrs(slog.String("client", client), slog.Any("err", err))
	return r
}
