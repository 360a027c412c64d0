package loglimit

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A lines is a log of messages.
type lines struct {
	level slog.Level
	block chan struct{} // nil: it takes what comes

	mu  sync.Mutex // guards all
	all []string
}

func (l *lines) Enabled(_ context.Context, level slog.Level) bool { return level >= l.level }
func (l *lines) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l *lines) WithGroup(string) slog.Handler                    { return l }

func (l *lines) Handle(_ context.Context, r slog.Record) error {
	if l.block != nil {
		<-l.block
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, r.Message)
	return nil
}

// take returns what was written since it was called last.
func (l *lines) take() []string {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.all
	l.all = nil
	return all
}

func message(format string, args ...any) slog.Record {
	return slog.NewRecord(time.Now(), slog.LevelWarn, fmt.Sprintf(format, args...), 0)
}

func more(sort, n int) slog.Record { return message("%d more of %d", n, sort) }

func note(l *Limiter, sort, times int) {
	for range times {
		l.Note(sort, func() slog.Record { return message("%d", sort) })
	}
}

func repeat(s string, n int) (all []string) {
	for range n {
		all = append(all, s)
	}
	return all
}

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &lines{}
		l := New(slog.New(log), 2, more)
		expect := func(when string, want ...string) {
			t.Helper()
			if diff := cmp.Diff(want, log.take()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		note(l, 0, Records)
		expect("as many as are written", repeat("0", Records)...)
		note(l, 0, 5)
		expect("too many")
		note(l, 1, 1)
		expect("another sort", "1")
		time.Sleep(Period)
		expect("the end of the period", "5 more of 0")
		note(l, 0, 1)
		expect("the next period", "0")
		time.Sleep(10 * Period)
		expect("nothing happens")
	})
}

// TestStuck has a log that takes nothing for a while: nobody waits for it, what waits is bounded,
// and in the end every event was told of.
func TestStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rounds, sorts = 20, 10
		log := &lines{block: make(chan struct{})}
		told := 0
		l := New(slog.New(log), sorts, func(sort, n int) slog.Record {
			told += n
			return more(sort, n)
		})
		for range rounds {
			for sort := range sorts {
				note(l, sort, 50)
			}
			time.Sleep(Period + 1)
		}
		l.mu.Lock()
		if n := len(l.queue); n != queueLength {
			t.Errorf("%d records wait, want %d", n, queueLength)
		}
		l.mu.Unlock()
		close(log.block)
		time.Sleep(3 * Period)
		for _, line := range log.take() {
			if len(line) == 1 {
				told++
			}
		}
		if told != rounds*sorts*50 {
			t.Errorf("told of %d events, want %d", told, rounds*sorts*50)
		}
	})
}

// TestNoLog makes no record where nobody reads it.
func TestNoLog(t *testing.T) {
	New(nil, 1, more).Note(0, func() slog.Record {
		t.Error("made a record for no log")
		return slog.Record{}
	})
	synctest.Test(t, func(t *testing.T) {
		log := &lines{level: slog.LevelError}
		note(New(slog.New(log), 1, more), 0, 1)
		if got := log.take(); got != nil {
			t.Errorf("a log of errors has %q", got)
		}
		time.Sleep(Period)
	})
}
