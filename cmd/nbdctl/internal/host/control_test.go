package host

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// controlled serves the control protocol for a record and returns its entry.
func controlled(t *testing.T) (Entry, Status) {
	t.Helper()
	dir := t.TempDir()
	index := 3
	r := newRecord(uuidA, "")
	r.Index = &index
	r.Since = r.Since.UTC().Truncate(time.Second)
	want := Status{Record: *r, Connections: []Traffic{{Read: OpTraffic{Requests: 7, Bytes: 4096}}},
		LastError: &Failure{Op: "read", Offset: 512, Length: 1024, Error: "boom", Time: r.Since}}
	l, err := listenControl(filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	c := newControl(l, func(ctx context.Context, req request) (*Status, error) {
		switch {
		case req.Op == opStatus:
			return &want, nil
		case req.Op == opChange && req.Change != nil && req.Change.Size != nil && *req.Change.Size == 4096:
			changed := want
			changed.Record.Size = 4096
			return &changed, nil
		case req.Op == opChange:
			return nil, exit.With(exit.Busy, "nbd3 is mounted")
		case req.Op == opKick:
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		return nil, exit.With(exit.Unsupported, "%w %q", errUnknownOp, req.Op)
	})
	t.Cleanup(func() { c.close(errEnding) })
	return Entry{Record: r, Alive: true, dir: dir}, want
}

func TestControlStatus(t *testing.T) {
	e, want := controlled(t)
	got, err := e.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&want, got, cmpopts.IgnoreUnexported(Status{})); diff != "" {
		t.Error(diff)
	}
	st, err := os.Stat(filepath.Join(e.dir, "ctl"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the control socket has mode %v, %v; only root is to connect", st.Mode(), err)
	}
}

// TestControlMoments asks a process that has not begun to answer, or has ceased to, and is told so
// in a sentence.
func TestControlMoments(t *testing.T) {
	s := newStore(t)
	r := newRecord(uuidA, "")
	index := 3
	r.Index = &index
	state, err := s.newStateDir(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	e := entries(t, s)[uuidA]
	check := func(code exit.Code, sentence string) {
		t.Helper()
		_, status := e.Status(t.Context())
		_, stats := e.Stats(t.Context())
		_, change := e.Change(t.Context(), Change{})
		for _, err := range []error{status, stats, change} {
			if exit.Of(err) != code || err == nil || err.Error() != sentence {
				t.Errorf("code %d, %v; want code %d, %s", exit.Of(err), err, code, sentence)
			}
		}
	}
	pid := strconv.Itoa(os.Getpid())
	check(exit.Busy, "nbd3 is being connected by pid "+pid+"; try again when it is done")
	r.Phase = PhaseLive
	if err := r.write(state.path); err != nil {
		t.Fatal(err)
	}
	check(exit.NotFound, "nbd3 is being disconnected by pid "+pid)
	// A control socket that nobody answers on any more is what a killed process leaves.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(state.path, "ctl"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	check(exit.NotFound, "nbd3 is being disconnected by pid "+pid)
	state.lock.Close()
	check(exit.Failure, "nbd3 is orphaned: pid "+pid+", which served it, has ended; nbdctl disconnect nbd3 frees it")
	if err := os.RemoveAll(state.path); err != nil {
		t.Fatal(err)
	}
	check(exit.NotFound, "nbd3 has been disconnected")
}

// TestControlEnding ends the answering while a request is being served, whose asker is told why.
func TestControlEnding(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctl")
	serving := make(chan struct{})
	l, err := listenControl(path)
	if err != nil {
		t.Fatal(err)
	}
	c := newControl(l, func(ctx context.Context, _ request) (*Status, error) {
		close(serving)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	go func() { <-serving; c.close(errEnding) }()
	e := Entry{Record: newRecord(uuidA, ""), dir: filepath.Dir(path)}
	_, err = e.Stats(t.Context())
	if exit.Of(err) != exit.NotFound || !strings.Contains(err.Error(), "is being disconnected") {
		t.Errorf("code %d, %v", exit.Of(err), err)
	}
}

// TestControlChange shows that a change goes there, and that what came of it comes back.
func TestControlChange(t *testing.T) {
	e, _ := controlled(t)
	size := int64(4096)
	got, err := e.Change(t.Context(), Change{Size: &size})
	if err != nil || got.Record.Size != size {
		t.Errorf("changed: %+v, %v", got, err)
	}
	size = 8192
	_, err = e.Change(t.Context(), Change{Size: &size})
	if exit.Of(err) != exit.Busy || !strings.Contains(err.Error(), "nbd3 is mounted") {
		t.Errorf("refused: %v, code %d", err, exit.Of(err))
	}
}

// TestControlPatience shows that who asks waits no longer than his context.
func TestControlPatience(t *testing.T) {
	e, _ := controlled(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := e.Kick(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an action without end: %v", err)
	}
}

// TestControlProtocol shows what other versions and strangers get.
func TestControlProtocol(t *testing.T) {
	e, _ := controlled(t)
	for _, tt := range []struct{ send, want string }{
		{`{"version":1,"op":"status"}`, `"pid":`},
		{`{"version":9,"op":"status","colour":"blue"}`, `"pid":`},
		{`{"version":9,"op":"hand-over"}`, `unknown operation \"hand-over\"`},
		{`{}`, `unknown operation`},
		{`GET / HTTP/1.1`, ""},
	} {
		c, err := net.Dial("unix", filepath.Join(e.dir, "ctl"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(tt.send + "\n")); err != nil {
			t.Fatal(err)
		}
		line, _ := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if !strings.Contains(line, tt.want) || tt.want == "" && line != "" {
			t.Errorf("to %s the answer is %q, want %q in it", tt.send, line, tt.want)
		}
	}
}

// TestControlSilentPeer shows that a peer that says nothing keeps nobody else
// from being answered.
func TestControlSilentPeer(t *testing.T) {
	e, _ := controlled(t)
	for range controlAskers - 1 {
		c, err := net.Dial("unix", filepath.Join(e.dir, "ctl"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), controlTimeout/2)
	defer cancel()
	if _, err := e.Status(ctx); err != nil {
		t.Error(err)
	}
}

// TestControlDeaf shows that a process that hangs does not hang who asks it.
func TestControlDeaf(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := Entry{Record: newRecord(uuidA, ""), dir: dir}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := e.Status(ctx); err == nil {
		t.Error("a process that never answers has a status")
	}
}

func TestReport(t *testing.T) {
	r := newRecord(uuidA, "")
	for _, tt := range []struct {
		name  string
		send  func(pipe *os.File) error
		ready bool
		says  string
		code  int
	}{
		{"ready", report{Ready: r}.send, true, "", 0},
		{"an error", report{Error: "no such file", Code: 6}.send, false, "no such file", 6},
		{"silence", (*os.File).Close, false, "ended before the device was ready", 1},
		{"an empty report", report{}.send, false, "empty report", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rd, wr, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer rd.Close()
			if err := tt.send(wr); err != nil {
				t.Fatal(err)
			}
			got, _, err := receive(rd)
			if (got != nil) != tt.ready || (err == nil) != tt.ready {
				t.Fatalf("received %v, %v", got, err)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.says) || int(exit.Of(err)) != tt.code) {
				t.Errorf("the error is %q with code %d, want %q with %d", err, exit.Of(err), tt.says, tt.code)
			}
		})
	}
}

// TestReportNobodyWaits shows that a starter that has gone is noticed: the
// device would be nobody's.
func TestReportNobodyWaits(t *testing.T) {
	rd, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	rd.Close()
	if err := (report{Ready: newRecord(uuidA, "")}).send(wr); err == nil {
		t.Error("a report to nobody was delivered")
	}
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openLog(path, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	line := []byte(strings.Repeat("x", 1<<14-1) + "\n")
	for range 5 * logLimit / len(line) {
		if n, err := l.Write(line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	last := []byte("the last line\n")
	if _, err := l.Write(last); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".1"} {
		st, err := os.Stat(p)
		if err != nil || st.Size() > logLimit || st.Size() == 0 {
			t.Errorf("%s has %d bytes, %v; the limit is %d", p, st.Size(), err, logLimit)
		}
	}
	if data, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(data), string(last)) {
		t.Errorf("the log does not end with the last line: %v", err)
	}
}

// TestRecordKeys pins the keys that other versions read.
func TestRecordKeys(t *testing.T) {
	data, err := json.Marshal(newRecord(uuidA, "x"))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{
		"version", "uuid", "identifier", "phase", "pid", "index", "since", "size", "block_size", "log", "spec",
	} {
		if !strings.Contains(string(data), `"`+key+`":`) {
			t.Errorf("the record has no %q: %s", key, data)
		}
	}
}
