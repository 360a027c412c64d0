package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestReconnection holds when attempts are made, when they end, and what the log says of it.
func TestReconnection(t *testing.T) {
	const ms, s = time.Millisecond, time.Second
	gone := errors.New("gone for good")
	for _, tt := range []struct {
		name  string
		idle  bool
		errs  []error       // of the attempts; the last one stays
		stop  time.Duration // after which the context ends; 0: never
		cause error         // then
		want  bool
		at    []time.Duration // attempts
		says  string          // levels of the records
	}{
		{name: "at once", errs: []error{nil}, want: true, at: []time.Duration{0}, says: ""},
		{
			name: "after an idle one", idle: true, errs: []error{nil}, want: true,
			at: []time.Duration{100 * ms}, says: "",
		},
		{
			name: "after a while", errs: []error{io.EOF, io.EOF, io.EOF, nil}, want: true,
			at: []time.Duration{0, 10 * ms, 30 * ms, 70 * ms}, says: "DEBUG DEBUG DEBUG",
		},
		{
			name: "never", errs: []error{io.EOF}, stop: 8 * s, cause: gone,
			at: []time.Duration{
				0, 10 * ms, 30 * ms, 70 * ms, 150 * ms, 310 * ms, 630 * ms, 1270 * ms, 2550 * ms, 4550 * ms, 6550 * ms,
			},
			says: "DEBUG DEBUG DEBUG DEBUG DEBUG DEBUG DEBUG WARN DEBUG DEBUG ERROR",
		},
		{
			name: "the device ends", errs: []error{io.EOF}, stop: 20 * ms, cause: errEnded,
			at: []time.Duration{0, 10 * ms}, says: "DEBUG",
		},
		{
			name: "the device ends, idle", idle: true, errs: []error{io.EOF}, stop: 20 * ms, cause: errEnded,
			at: []time.Duration{20 * ms}, says: "",
		},
		{
			name: "another's", errs: []error{fmt.Errorf("it: %w", nbdnl.ErrNotOwner)},
			at: []time.Duration{0}, says: "ERROR",
		},
		{
			name: "disconnected", errs: []error{io.EOF, nbdnl.ErrNotConnected},
			at: []time.Duration{0, 10 * ms}, says: "DEBUG ERROR",
		},
		{name: "removed", errs: []error{os.ErrNotExist}, at: []time.Duration{0}, says: "ERROR"},
		{name: "not allowed", errs: []error{os.ErrPermission}, at: []time.Duration{0}, says: "ERROR"},
		{name: "no way", errs: []error{errors.ErrUnsupported}, at: []time.Duration{0}, says: "ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, giveUp := context.WithCancelCause(t.Context())
				if tt.stop > 0 {
					time.AfterFunc(tt.stop, func() { giveUp(tt.cause) })
				}
				var said bytes.Buffer
				var at []time.Duration
				begin := time.Now()
				r := reconnection{
					attempt: func(context.Context) error {
						at = append(at, time.Since(begin))
						return tt.errs[min(len(at), len(tt.errs))-1]
					},
					giveUp: giveUp,
					idle:   tt.idle,
					log:    slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug})),
				}
				if got := r.run(ctx); got != tt.want {
					t.Errorf("replaced: %t", got)
				}
				if diff := cmp.Diff(tt.at, at); diff != "" {
					t.Errorf("attempts (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tt.says, levels(said.String())); diff != "" {
					t.Errorf("the log (-want +got):\n%s%s", diff, said.String())
				}
				giveUp(nil)
			})
		})
	}
}

// levels returns the level of each record of a log.
func levels(log string) string {
	var levels []string
	for line := range strings.Lines(log) {
		_, rest, _ := strings.Cut(line, "level=")
		level, _, _ := strings.Cut(rest, " ")
		levels = append(levels, level)
	}
	return strings.Join(levels, " ")
}
