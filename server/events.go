package server

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
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
	eventClient           // a client that had one, whose connection failed
	eventEnded            // a client that had one
	events                // how many there are
)

var eventNames = [events]string{"failed", "refused", "slow", "handshake", "connection", "ended"}

// ofClient reports whether events of that sort are not requests.
func ofClient(sort int) bool { return sort >= eventHandshake }

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

// handshakeRecord tells of a client that did not come to an export.
func handshakeRecord(client string, err error) slog.Record {
	r := slog.NewRecord(time.Now(), slog.LevelWarn, "handshake failed", 0)
	r.AddAttrs(slog.String("client", client), slog.Any("err", err))
	return r
}

// connectionRecord tells of a client that had an export, and has gone: err is what Transmit
// returned.
func connectionRecord(s *Session, client string, took time.Duration, err error) slog.Record {
	level, text := slog.LevelInfo, "connection ended"
	if failed(err) {
		level, text = slog.LevelWarn, "connection failed"
	}
	r := slog.NewRecord(time.Now(), level, text, 0)
	r.AddAttrs(slog.String("client", client))
	a := &s.Agreement
	if over, ok := s.NetConn().(*tls.Conn); ok {
		state := over.ConnectionState()
		r.AddAttrs(slog.String("tls", tls.VersionName(state.Version)))
		if len(state.PeerCertificates) > 0 {
			r.AddAttrs(slog.String("identity", state.PeerCertificates[0].Subject.String()))
		}
	}
	form := "simple"
	switch {
	case a.Extended:
		form = "extended"
	case a.Structured:
		form = "structured"
	}
	r.AddAttrs(slog.String("export", a.Export), slog.String("replies", form))
	for _, c := range a.Contexts {
		r.AddAttrs(slog.String("context", c.Name))
	}
	st := s.conn.Stats()
	all := st.Total()
	r.AddAttrs(
		slog.Duration("lasted", took.Round(time.Millisecond)),
		slog.Uint64("requests", all.Requests),
		slog.Uint64("errors", all.Errors),
		slog.Uint64("read", st.Read.Bytes),
		slog.Uint64("written", st.Write.Bytes),
	)
	switch {
	case failed(err):
		r.AddAttrs(slog.Any("err", err))
	case err != nil:
		r.AddAttrs(slog.String("by", "server"))
	case s.conn.Disconnected():
		r.AddAttrs(slog.String("by", "client"))
	default:
		r.AddAttrs(slog.String("by", "client, without NBD_CMD_DISC"))
	}
	return r
}

// failed reports whether what Transmit has returned is a failure of the connection.
func failed(err error) bool {
	return err != nil && err != ErrShutdown && !errors.Is(err, net.ErrClosed)
}
