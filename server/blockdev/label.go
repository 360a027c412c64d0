package blockdev

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// A label says in each record of a log which device it is about: a program with many of them gives
// all of them one logger. It wraps the handler and not the logger, for the device has no index when
// its logger is made.
type label struct {
	slog.Handler
	identifier string
	path       *atomic.Pointer[string] // of the device; of nothing until the kernel has it
}

// Handle puts the device before what else the record has.
func (l label) Handle(ctx context.Context, r slog.Record) error {
	labelled := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	if path := l.path.Load(); path != nil {
		labelled.AddAttrs(slog.String("device", *path))
	}
	labelled.AddAttrs(slog.String("identifier", l.identifier))
	r.Attrs(func(a slog.Attr) bool {
		labelled.AddAttrs(a)
		return true
	})
	return l.Handler.Handle(ctx, labelled)
}

// WithAttrs returns a label on the handler with those attributes.
func (l label) WithAttrs(attrs []slog.Attr) slog.Handler {
	l.Handler = l.Handler.WithAttrs(attrs)
	return l
}

// WithGroup returns a label on the handler with that group, in which the device is, too.
func (l label) WithGroup(name string) slog.Handler {
	l.Handler = l.Handler.WithGroup(name)
	return l
}
