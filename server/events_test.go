package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

// A record is what a test looks at in a record of the log.
type record struct {
	Time           time.Time
	Level, Msg     string
	Op, Err, Which string
	Offset         uint64
	Length, Errno  uint32
	Took           time.Duration
	More           int
}

// A logBuffer takes a log of JSON records. Safe for concurrent use: fake time orders the log's
// writers and its reader, but the race detector does not know that.
type logBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// handler returns a handler that writes to b.
func (b *logBuffer) handler() slog.Handler { return slog.NewJSONHandler(b, nil) }

// records takes what was written.
func (b *logBuffer) records(t *testing.T) []record {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []record
	for d := json.NewDecoder(&b.buf); ; {
		var r record
		if err := d.Decode(&r); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatalf("log: %v", err)
		}
		all = append(all, r)
	}
}

// pausing makes a disk take its time for requests that begin at offset 0.
func pausing(d *disk, pause time.Duration, err error) {
	d.before = func(op string, off, n int64) error {
		if off != 0 {
			return nil
		}
		time.Sleep(pause)
		return err
	}
}

// TestSlowLog holds which requests the log tells of, and what, whoever executes them.
func TestSlowLog(t *testing.T) {
	const limit = 100 * time.Millisecond
	read, write := call{op: cmdRead, length: 512}, call{op: cmdWrite, data: make([]byte, 1024)}
	tests := []struct {
		name  string
		limit time.Duration
		pause time.Duration
		err   error
		q     call
		want  []record
	}{
		{"in time", limit, limit - 1, nil, read, nil},
		{"slow read", limit, limit, nil, read,
			[]record{{Level: "WARN", Msg: "slow request", Op: "read", Length: 512, Took: limit}}},
		{"slow write", limit, 2 * limit, nil, write,
			[]record{{Level: "WARN", Msg: "slow request", Op: "write", Length: 1024, Took: 2 * limit}}},
		{"slow trim", limit, limit, nil, call{op: cmdTrim, length: 4096},
			[]record{{Level: "WARN", Msg: "slow request", Op: "trim", Length: 4096, Took: limit}}},
		{"slow flush", limit, limit, nil, call{op: cmdFlush},
			[]record{{Level: "WARN", Msg: "slow request", Op: "flush", Took: limit}}},
		{"by default in time", 0, time.Second - 1, nil, read, nil},
		{"by default slow", 0, time.Second, nil, read,
			[]record{{Level: "WARN", Msg: "slow request", Op: "read", Length: 512, Took: time.Second}}},
		{"never slow", -1, time.Hour, nil, read, nil},
		{"slow, and failed then", limit, time.Minute, syscall.ENOSPC, write,
			[]record{{Level: "ERROR", Msg: "request failed", Op: "write", Length: 1024, Took: time.Minute,
				Errno: enospc, Err: "0 of 1024 bytes: no space left on device"}}},
		{"failed, and never slow", -1, limit, syscall.EIO, call{op: cmdFlush},
			[]record{{Level: "ERROR", Msg: "request failed", Op: "flush", Took: limit, Errno: eio,
				Err: "input/output error"}}},
	}
	for _, tt := range tests {
		for _, inline := range []bool{false, true} {
			t.Run(tt.name+map[bool]string{true: " without workers"}[inline], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var log logBuffer
					d := newDisk(1 << 20)
					o := server.Options{SlowRequest: tt.limit, Logger: slog.New(log.handler())}
					s := connect(t, export(t, d, o))
					if inline {
						warm(s.client)
					}
					pausing(d, tt.pause, tt.err)
					s.do(tt.q)
					synctest.Wait()
					got := log.records(t)
					for i, r := range got {
						if !r.Time.Equal(time.Now()) {
							t.Errorf("record of %v, now it is %v", r.Time, time.Now())
						}
						got[i].Time = time.Time{}
					}
					if diff := cmp.Diff(tt.want, got); diff != "" {
						t.Errorf("log (-want +got):\n%s", diff)
					}
					s.disconnect()
				})
			})
		}
	}
}

// TestLogIsBounded has every request fail or take long: the log tells of some, and how many more
// there were. One trouble does not keep another one out of it.
func TestLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBuffer
		d := newDisk(1 << 20)
		e := export(t, d, server.Options{SlowRequest: time.Millisecond, Logger: slog.New(log.handler())})
		s := connect(t, e)
		// summary says how often each kind of record is in the log, and of how many requests the
		// last of them tell.
		summary := func() map[string]int {
			synctest.Wait()
			n := make(map[string]int)
			for _, r := range log.records(t) {
				n[r.Msg+r.Which]++
				n["more "+r.Which] += r.More
			}
			delete(n, "more ")
			return n
		}
		expect := func(when string, want map[string]int) {
			t.Helper()
			if diff := cmp.Diff(want, summary()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		pausing(d, 0, syscall.EIO)
		for range 1000 {
			s.expect(einval, call{op: cmdRead, offset: 1 << 40, length: 512})
			s.expect(eio, call{op: cmdFlush})
		}
		expect("at once", map[string]int{"request failed": 20})
		pausing(d, time.Millisecond, nil)
		for range 15 {
			s.expect(0, call{op: cmdRead, length: 512})
		}
		expect("slow ones besides", map[string]int{"slow request": 10})
		time.Sleep(10 * time.Second)
		expect("after a while", map[string]int{
			"more requests than are loggedfailed":  1,
			"more requests than are loggedrefused": 1,
			"more requests than are loggedslow":    1,

			"more failed": 990, "more refused": 990, "more slow": 5,
		})
		s.expect(0, call{op: cmdRead, length: 512})
		expect("the next one", map[string]int{"slow request": 1})
		time.Sleep(time.Minute)
		expect("nothing more", map[string]int{})
		s.disconnect()
	})
}

// A stuckHandler is a log that takes nothing until it is released.
type stuckHandler struct {
	slog.Handler
	release <-chan struct{}
}

func (h stuckHandler) Handle(ctx context.Context, r slog.Record) error {
	<-h.release
	return h.Handler.Handle(ctx, r)
}

// TestStuckLog holds that requests do not wait for the log, which may depend on them, and that what
// it has missed is counted.
func TestStuckLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const floods, flood = 20, 50
		var log logBuffer
		release := make(chan struct{})
		d := newDisk(1 << 20)
		pausing(d, 0, syscall.EIO)
		s := connect(t, export(t, d, server.Options{Logger: slog.New(stuckHandler{log.handler(), release})}))
		for range floods {
			for range flood {
				s.expect(eio, call{op: cmdRead, length: 512})
			}
			time.Sleep(11 * time.Second)
		}
		s.disconnect()
		close(release)
		time.Sleep(time.Minute)
		synctest.Wait()
		told := 0
		all := log.records(t)
		for _, r := range all {
			told += max(1, r.More)
		}
		if told != floods*flood || len(all) > 100 {
			t.Errorf("%d records tell of %d requests, want %d", len(all), told, floods*flood)
		}
	})
}
