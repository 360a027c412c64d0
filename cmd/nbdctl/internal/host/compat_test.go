package host

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// The files below testdata are named by the commit whose nbdctl wrote them, on Linux 6.1: records
// of live devices, and what its serving processes answered to its own requests. make test-compat
// tries the programs themselves.

// object is b as a script sees it.
func object(t *testing.T, b []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return v
}

// encoded is v as this version writes it.
func encoded(t *testing.T, v any) any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return object(t, b)
}

// stateFile makes the directory of a device with that record, and returns it.
func stateFile(t *testing.T, uuid, content string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), uuid)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOldRecords reads records of older versions, and writes them as those did, who read them too.
func TestOldRecords(t *testing.T) {
	paths, err := filepath.Glob("testdata/*/*.json")
	if err != nil || len(paths) < 4 {
		t.Fatalf("%d records, %v", len(paths), err)
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		uuid := object(t, content).(map[string]any)["uuid"].(string)
		r, err := readRecord(stateFile(t, uuid, string(content)))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(object(t, content), encoded(t, r)); diff != "" {
			t.Errorf("%s is written as another (-old +new):\n%s", path, diff)
		}
	}
	content, err := os.ReadFile("testdata/951cde1/loss.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := readRecord(stateFile(t, "1c538763-e47d-479e-a829-35164bf4e0e6", string(content)))
	if err != nil {
		t.Fatal(err)
	}
	index, since := 0, time.Date(2026, 11, 29, 4, 23, 25, 565e6, time.UTC)
	want := &Record{
		Version: 1, UUID: "1c538763-e47d-479e-a829-35164bf4e0e6",
		Identifier: "nbdctl:1c538763-e47d-479e-a829-35164bf4e0e6",
		Phase:      PhaseLive, PID: 768, Index: &index, Incarnation: 14747, Mode: "netlink", Since: since, Serving: 2,
		Size: 32 << 20, BlockSize: 512,
		Log: "/run/nbdctl/1c538763-e47d-479e-a829-35164bf4e0e6/log",
		Spec: Spec{Label: "scratch", Kind: "memory", Options: []string{"limit=1M"}, Size: 64 << 20, Connections: 2,
			Timeout: 40 * time.Second, DeadTimeout: 7 * time.Second},
		Loss: &Loss{Time: since.Add(944523171),
			Error: "write of 1048576 bytes at 0: 0 of 1048576 bytes: memory: write of 1048576 bytes at 0: " +
				"131072 of 1048576 bytes are in use, 983040 more are needed: no space left on device"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// An exchange is a request to a process of an older version, and its answer.
type exchange struct {
	Request  json.RawMessage `json:"request"`
	Response json.RawMessage `json:"response"`
}

func exchanges(t *testing.T) (all []exchange) {
	t.Helper()
	f, err := os.Open("testdata/951cde1/control.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, controlLimit)
	for lines.Scan() {
		var e exchange
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	if lines.Err() != nil || len(all) < 10 {
		t.Fatalf("%d exchanges, %v", len(all), lines.Err())
	}
	return all
}

// answering is the entry of a process that gives those answers, whatever it is asked; the requests
// that it got are sent to the channel.
func answering(t *testing.T, answers ...string) (*Entry, <-chan string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	requests := make(chan string, len(answers))
	go func() {
		for _, a := range answers {
			c, err := l.Accept()
			if err != nil {
				return // the test has ended
			}
			line, _ := bufio.NewReader(c).ReadString('\n')
			requests <- line
			_, _ = c.Write([]byte(a + "\n")) // The asker may have gone.
			c.Close()
		}
	}()
	index := 3
	r := newRecord(uuidA, "")
	r.Index = &index
	r.PID = 4711
	return &Entry{Record: r, Alive: true, dir: dir}, requests
}

// TestOldControl holds that an older process is asked what it understands, and that its answers are
// understood, whole.
func TestOldControl(t *testing.T) {
	for _, x := range exchanges(t) {
		var req request
		if err := json.Unmarshal(x.Request, &req); err != nil {
			t.Fatal(err)
		}
		e, requests := answering(t, string(x.Response))
		got, err := e.ask(t.Context(), req)
		asked := <-requests
		if diff := cmp.Diff(object(t, x.Request), object(t, []byte(asked))); diff != "" {
			t.Errorf("%s is asked as another (-old +new):\n%s", x.Request, diff)
		}
		answer := response{Version: controlVersion, Status: got}
		if err != nil {
			answer.Error, answer.Code = err.Error(), exit.Of(err)
		}
		if diff := cmp.Diff(object(t, x.Response), encoded(t, answer)); diff != "" {
			t.Errorf("the answer to %s is read as another (-old +new):\n%s", x.Request, diff)
		}
	}
}

// TestOldAsker holds that an older nbdctl is answered as by a process of its own version.
func TestOldAsker(t *testing.T) {
	for _, x := range exchanges(t) {
		var req request
		var resp response
		if err := errors.Join(json.Unmarshal(x.Request, &req), json.Unmarshal(x.Response, &resp)); err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			answer(t.Context(), there, func(_ context.Context, got request) (*Status, error) {
				if diff := cmp.Diff(req, got); diff != "" {
					t.Errorf("%s is understood as another:\n%s", x.Request, diff)
				}
				if resp.Error != "" {
					return nil, exit.With(resp.Code, "%s", resp.Error)
				}
				return resp.Status, nil
			})
		}()
		if _, err := here.Write(append(x.Request, '\n')); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(here).ReadBytes('\n')
		here.Close()
		if err != nil {
			t.Fatalf("%s: %v", x.Request, err)
		}
		if diff := cmp.Diff(object(t, x.Response), object(t, line)); diff != "" {
			t.Errorf("the answer to %s is another (-old +new):\n%s", x.Request, diff)
		}
	}
}

// TestNewerUnreadable holds that a record of a newer version which can't be read is told in a
// sentence.
func TestNewerUnreadable(t *testing.T) {
	for content, says := range map[string]string{
		`{"version": 2, "uuid": "` + uuidA + `", "spec": "memory"}`: "state.json: is of version 2, " +
			"of which this nbdctl knows up to 1; use the nbdctl that connected",
		`{"version": 2, "uuid": 7}`:                                "is of version 2",
		`{"version": "two", "uuid": "` + uuidA + `"}`:              "state.json: json: cannot unmarshal",
		`{"version": 1, "uuid": "` + uuidA + `", "size": "large"}`: "state.json: json: cannot unmarshal",
		`[]`: "state.json: json: cannot unmarshal",
	} {
		r, err := readRecord(stateFile(t, uuidA, content))
		if r != nil || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s is read as %+v, %v; want %q", content, r, err, says)
		}
	}
}

// TestNewerControl holds that what a newer process answers is taken as far as it is understood, and
// told in a sentence where it is not; and so is what a newer nbdctl asks.
func TestNewerControl(t *testing.T) {
	const newer = "pid 4711 answers in version 2 of the control protocol, of which this nbdctl knows up to 1; " +
		"use the nbdctl that connected nbd3"
	for _, tt := range []struct {
		answer string
		code   exit.Code
		says   string // empty: understood
	}{
		{`{"version": 2, "colour": "blue", "status": {"record": {"version": 2, "pid": 4711}}}`, exit.OK, ""},
		{`{"version": 2, "error": "nbd3 is mounted", "code": 6}`, exit.Busy, "nbd3 is mounted"},
		{`{"version": 2, "error": "the stars are wrong", "code": 99}`, 99, "the stars are wrong"},
		{`{"version": 2, "result": {"pid": 4711}}`, exit.Unsupported, newer},
		{`{"version": 2, "status": "fine"}`, exit.Unsupported, newer},
		{`{"version": 2, "error": {"code": 6}}`, exit.Unsupported, newer},
		{`{"version": 1}`, exit.Failure, "pid 4711 gives an answer that can't be read: nothing that was asked for"},
		{`{"version": 1, "status": 7}`, exit.Failure, "pid 4711 gives an answer that can't be read"},
		{`[]`, exit.Failure, "pid 4711 gives an answer that can't be read"},
		{`null`, exit.Failure, "pid 4711 gives an answer that can't be read"},
		{`HTTP/1.1 400 Bad Request`, exit.NotFound, "nbd3 has been disconnected"}, // its directory is empty here
	} {
		e, _ := answering(t, tt.answer, tt.answer, tt.answer, tt.answer, tt.answer) // a change asks twice
		_, status := e.Status(t.Context())
		_, stats := e.Stats(t.Context())
		_, loss := e.Loss(t.Context())
		_, change := e.Change(t.Context(), Change{})
		for op, err := range map[string]error{opStatus: status, opStats: stats, opLoss: loss, opChange: change} {
			if exit.Of(err) != tt.code || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s, answered with %s: code %d, %v; want code %d, %q", op, tt.answer, exit.Of(err), err,
					tt.code, tt.says)
			}
		}
	}
	e, _ := controlled(t)
	for ask, want := range map[string]string{
		`{"version": 2, "op": {"name": "status"}}`:         `asked in version 2 of the control protocol`,
		`{"version": 2, "op": "change", "change": "size"}`: `"code":5`,
		`{"version": 1, "op": 7}`:                          "",
	} {
		c, err := net.Dial("unix", filepath.Join(e.dir, "ctl"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(ask + "\n")); err != nil {
			t.Fatal(err)
		}
		line, _ := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if !strings.Contains(line, want) || want == "" && line != "" {
			t.Errorf("to %s the answer is %q, want %q in it", ask, line, want)
		}
	}
}
