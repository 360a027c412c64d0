package server_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// odd is a backend whose ReadAt and WriteAt return what they are told to.
type odd struct {
	n   func(p []byte) int
	err error
}

func (o odd) Size() int64                              { return 1 << 20 }
func (o odd) ReadAt(p []byte, off int64) (int, error)  { return o.n(p), o.err }
func (o odd) WriteAt(p []byte, off int64) (int, error) { return o.n(p), o.err }

// TestCounts holds that only the count decides: all bytes is success, fewer is a failure, and never
// are zeros made up.
func TestCounts(t *testing.T) {
	all := func(p []byte) int { return len(p) }
	tests := []struct {
		name  string
		b     odd
		errno uint32
		cause error
	}{
		{"all, no error", odd{all, nil}, 0, nil},
		{"all, with EOF", odd{all, io.EOF}, 0, nil},
		{"short, no error", odd{func(p []byte) int { return len(p) - 1 }, nil}, eio, errAny},
		{"short, with EOF", odd{func(p []byte) int { return len(p) - 1 }, io.EOF}, eio, io.EOF},
		{"short, with ENOSPC", odd{func(p []byte) int { return 1 }, syscall.ENOSPC}, enospc, syscall.ENOSPC},
		{"nothing", odd{func(p []byte) int { return 0 }, nil}, eio, errAny},
		{"more than all", odd{func(p []byte) int { return len(p) + 1 }, nil}, eio, errAny},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := export(t, tt.b, server.Options{})
				s := connect(t, e)
				for _, q := range []call{{op: cmdRead, length: 512}, {op: cmdWrite, data: make([]byte, 512)}} {
					s.expect(tt.errno, q)
					if tt.errno != 0 {
						checkError(t, e.LastError().Err, tt.cause)
					} else if e.LastError() != nil {
						t.Errorf("last error %v, want none", e.LastError())
					}
				}
				s.disconnect()
			})
		})
	}
}

// TestFailuresAreTold holds that the whole story of a failed request is in the log and in
// LastError, while the client gets a number and the connection lives on.
func TestFailuresAreTold(t *testing.T) {
	cause := errors.New("the tape is torn")
	tests := []struct {
		name  string
		q     call
		fail  func() error
		errno uint32
		level string
		text  string
		stack string
	}{
		{"backend error", call{op: cmdWrite, offset: 8192, data: make([]byte, 512)},
			func() error { return fmt.Errorf("drum 3: %w", cause) }, eio, "ERROR",
			"0 of 512 bytes: drum 3: the tape is torn", ""},
		{"failed sync", call{op: cmdFlush}, func() error { return cause }, eio, "ERROR", "the tape is torn", ""},
		{"failed trim", call{op: cmdTrim, offset: 512, length: 1 << 19}, func() error { return syscall.EOPNOTSUPP },
			95, "ERROR",
			"operation not supported", ""},
		{"failed sync of FUA", call{op: cmdTrim, flags: fua, offset: 512, length: 512}, func() error { return cause },
			eio,
			"ERROR", "the tape is torn", ""},
		{"refused", call{op: cmdRead, offset: 1 << 40, length: 512}, nil, einval, "WARN",
			"past the end of the export", ""},
		{"panic", call{op: cmdRead, length: 512}, func() error { panic("index out of range") }, eio, "ERROR",
			"the backend panicked: index out of range", "TestFailuresAreTold"},
		{"goexit", call{op: cmdRead, length: 512}, func() error { runtime.Goexit(); return nil }, eio, "ERROR",
			"the backend ended its goroutine", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(1 << 20)
				d.before = func(op string, off, n int64) error {
					if op == "trim" && tt.q.flags&fua != 0 {
						return nil
					}
					return tt.fail()
				}
				var log bytes.Buffer
				e := export(t, d, server.Options{Logger: slog.New(slog.NewJSONHandler(&log, nil))})
				s := connect(t, e)
				s.expect(tt.errno, tt.q)
				synctest.Wait() // Nobody waits for the log but who wants to read it.

				var record struct {
					Level          string
					Op, Err, Stack string
					Offset         uint64
					Length         uint32
					Errno          uint32
				}
				if err := json.Unmarshal(log.Bytes(), &record); err != nil {
					t.Fatalf("log %q: %v", log.String(), err)
				}
				length := tt.q.length + uint32(len(tt.q.data))
				if record.Level != tt.level || record.Offset != tt.q.offset || record.Length != length ||
					record.Errno != tt.errno ||
					!strings.Contains(record.Err, tt.text) || !strings.Contains(record.Stack, tt.stack) {
					t.Errorf("log record %+v", record)
				}
				last := e.LastError()
				if uint16(last.Op) != tt.q.op || last.Offset != tt.q.offset || last.Length != uint64(length) ||
					!last.Time.Equal(time.Now()) || !strings.Contains(last.Error(), tt.text) {
					t.Errorf("last error %+v", last)
				}
				if record.Op != last.Op.String() {
					t.Errorf("log says %q, last error %q", record.Op, last.Op)
				}
				d.before = nil
				s.expect(0, call{op: cmdRead, length: 512})
				s.disconnect()
			})
		})
	}
	d := newDisk(512)
	d.before = func(string, int64, int64) error { return cause }
	e := export(t, d, server.Options{})
	s := connect(t, e)
	s.expect(eio, call{op: cmdFlush})
	if !errors.Is(e.LastError(), cause) {
		t.Errorf("%v does not lead to its cause", e.LastError())
	}
	s.disconnect()
}

// TestNoHeaderBeforeData has a backend fail after having filled half of what was to be read:
// nothing of that may show.
func TestNoHeaderBeforeData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		b := odd{n: func(p []byte) int { copy(p, "half"); <-release; return len(p) / 2 }}
		s := connect(t, export(t, b, server.Options{}))
		got := s.start(call{op: cmdRead, length: 4096})
		synctest.Wait()
		select {
		case p := <-got:
			t.Fatalf("a reply before the data were read: %+v", p)
		default:
		}
		close(release)
		if p := <-got; p.errno != eio || len(p.data) != 0 {
			t.Errorf("error %d with %d bytes, want %d with none", p.errno, len(p.data), eio)
		}
		s.disconnect()
	})
}
