package blockdev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A successor is the other side of HandOverTo.
type successor func(*testing.T, *orphan, *net.UnixConn) error

// opens returns always that one.
func opens(b backends.Backend) Opener {
	return func(context.Context, *Document, []*os.File) (backends.Backend, error) { return b, nil }
}

// TestHandOverFails has each step of a successor fail: the old process goes on as if nothing had
// been, and its connections are the same.
func TestHandOverFails(t *testing.T) {
	boom := errors.New("boom")
	// speaks is a successor that receives the document and says something.
	speaks := func(say ...string) successor {
		return func(t *testing.T, _ *orphan, c *net.UnixConn) error {
			_, files, err := receive(c)
			closeAll(files)
			if err != nil {
				t.Error(err)
			}
			for _, s := range say {
				if _, err := io.WriteString(c, s); err != nil {
					t.Error(err)
				}
			}
			return c.Close()
		}
	}
	// takes is one that takes the device over, with what open returns for it.
	takes := func(open Opener) successor {
		return func(t *testing.T, o *orphan, c *net.UnixConn) error {
			d, err := o.machine.takeOverFrom(t.Context(), c, open, o.options)
			if d != nil {
				t.Error("there is a device")
			}
			return err
		}
	}
	// edits is one that reads something else in the document.
	edits := func(edit func(*Document)) successor {
		return takes(func(_ context.Context, doc *Document, _ []*os.File) (backends.Backend, error) {
			edit(doc)
			return newElastic(), nil
		})
	}
	// listens is one that says nothing.
	listens := func(t *testing.T, _ *orphan, c *net.UnixConn) error {
		_, files, err := receive(c)
		closeAll(files)
		return err
	}
	small := &fitting{store: newStore(), size: size / 2}
	for name, tt := range map[string]struct {
		successor successor
		want      string
	}{
		"hangs up at once": {func(_ *testing.T, _ *orphan, c *net.UnixConn) error { return c.Close() }, ""},
		"hangs up":         {speaks(), "has hung up"},
		"refuses":          {speaks(`{"error":"no"}` + "\n"), "says: no"},
		"nonsense":         {speaks("ready\n"), "not understood"},
		"out of its turn":  {speaks(`{"serving":true}` + "\n"), "out of its turn"},
		"half a line":      {speaks(`{"ready":true}`), "has hung up"},
		"no backend": {takes(func(context.Context, *Document, []*os.File) (backends.Backend, error) {
			return nil, boom
		}), "boom"},
		"another backend":   {takes(opens(small)), "backend size is"},
		"a newer document":  {edits(func(doc *Document) { doc.Version++ }), "version 2"},
		"another device":    {edits(func(doc *Document) { doc.Identifier = "x" }), "identifier is"},
		"a missing socket":  {edits(func(doc *Document) { doc.Leased = true }), "came with 2 descriptors"},
		"does not answer":   {listens, "takes too long"},
		"does not even ask": {func(*testing.T, *orphan, *net.UnixConn) error { return nil }, "takes too long"},
	} {
		t.Run(name, func(t *testing.T) {
			o := orphaned(t, nbdnltest.Options{}, 2)
			o.e.timeout = time.Second // as far as the process knows
			old := o.adopt(t)
			o.half(t, 0)
			ours, theirs := passage(t)
			before := watchedDescriptors(t, 2)
			handed := make(chan error, 1)
			go func() { handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{}) }()
			err := tt.successor(t, o, theirs)
			if tt.want != "" && err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("the successor: %v, want %q", err, tt.want)
			}
			err = <-handed
			if err == nil || errors.Is(err, ErrHandedOver) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("handed over: %v, want %q", err, tt.want)
			}
			if name == "does not answer" { // It may be about to.
				err := newLines(theirs).expect(t.Context(), func(line) bool { return false })
				if err == nil || !strings.Contains(err.Error(), "says: the other process takes too long") {
					t.Errorf("it is told %v", err)
				}
			}
			if open := descriptors(t); len(open) > before {
				t.Errorf("there were %d descriptors, and now are %q", before, open)
			}
			o.rest(t, 0)
			read(t, o.kernel[1])
			if n := o.Commands(nbdnltest.Reconfigure); n != 0 || old.State() != nbdnl.StateLive || o.Dead(3) != 0 {
				t.Errorf("%d connections were replaced, it is %v", n, old.State())
			}
			if err := old.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, o.Kernel)
		})
	}
}

// descriptors lists what this process has open.
func descriptors(t *testing.T) (open []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open = append(open, to)
		}
	}
	return open
}

// watchedDescriptors returns how many there are when so many connections are watched for a hang-up,
// which begins a moment after they are served.
func watchedDescriptors(t *testing.T, connections int) int {
	t.Helper()
	const own = 1 // the runtime's
	for deadline := time.Now().Add(5 * time.Second); ; <-time.After(time.Millisecond) {
		open := descriptors(t)
		polls := 0
		for _, to := range open {
			if to == "anon_inode:[eventpoll]" {
				polls++
			}
		}
		if polls == own+connections {
			return len(open)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are not watched: %q", connections, open)
		}
	}
}

// TestHandOverLast has a successor go wrong when everything was said: if it says so, the device
// goes on, if it dies, that gets new connections, and else it is the successor's.
func TestHandOverLast(t *testing.T) {
	for name, tt := range map[string]struct {
		last     func(*testing.T, *net.UnixConn, *lines)
		away     bool
		replaced bool
	}{
		"gives up": {func(t *testing.T, _ *net.UnixConn, l *lines) {
			if err := l.say(line{Error: "no"}); err != nil {
				t.Error(err)
			}
		}, false, false},
		"dies":         {func(_ *testing.T, c *net.UnixConn, _ *lines) { c.Close() }, false, true},
		"says nothing": {func(*testing.T, *net.UnixConn, *lines) {}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := orphaned(t, nbdnltest.Options{}, 1)
			o.e.timeout = time.Second
			old := o.adopt(t)
			ours, theirs := passage(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			handed := make(chan error, 1)
			go func() { handed <- old.HandOverTo(ctx, ours, HandOverOptions{}) }()
			_, files, err := receive(theirs)
			defer closeAll(files)
			l := newLines(theirs)
			err = errors.Join(err, l.say(line{Ready: true}))
			if err := errors.Join(err, l.expect(t.Context(), func(l line) bool { return l.Go })); err != nil {
				t.Fatal(err)
			}
			cancel() // It is too late for that.
			if !tt.away {
				closeAll(files)
			}
			tt.last(t, theirs, l)
			err = <-handed
			if err == nil || errors.Is(err, ErrHandedOver) != tt.away || isDone(old) != tt.away {
				t.Fatalf("handed over: %v, done %v", err, isDone(old))
			}
			if tt.away {
				closeAll(files)
				if err := o.options.Client.Drop(t.Context(), 3, o.e.identifier); err != nil {
					t.Error(err)
				}
				return
			}
			for tt.replaced && old.Outage().Replaced == 0 {
				<-old.Changes()
			}
			if n := old.Outage().Replaced; (n > 0) != tt.replaced || old.Alive() != 1 {
				t.Errorf("%d connections were replaced, %d are alive", n, old.Alive())
			}
			if err := old.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, o.Kernel)
		})
	}
}

// TestTakeOverGivesUp has the context of a successor end while it waits for the last word: it says
// that it does not serve the device, also if the word has come.
func TestTakeOverGivesUp(t *testing.T) {
	for _, gone := range []bool{false, true} {
		o := orphaned(t, nbdnltest.Options{}, 1)
		old := o.adopt(t)
		h, err := old.HandOver(t.Context(), HandOverOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := passage(t)
		if err := send(ours, &h.Document, h.Files); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() {
			d, err := o.machine.takeOverFrom(ctx, theirs, opens(newElastic()), o.options)
			if d != nil {
				t.Error("there is a device")
			}
			result <- err
		}()
		l := newLines(ours)
		if err := l.expect(t.Context(), func(l line) bool { return l.Ready }); err != nil {
			t.Fatal(err)
		}
		want := context.Canceled
		if gone {
			want = nil
			ours.Close()
		} else {
			cancel()
		}
		if err := <-result; err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("it is taken over: %v", err)
		}
		if !gone {
			err := l.expect(t.Context(), func(line) bool { return false })
			if err == nil || !strings.Contains(err.Error(), "context canceled") {
				t.Errorf("the successor says: %v", err)
			}
		}
		cancel()
		h.Resume()
		read(t, o.kernel[0])
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, o.Kernel)
	}
}

// TestReceive holds what is no device, and that no descriptor stays open of one that was refused.
func TestReceive(t *testing.T) {
	for name, tt := range map[string]struct {
		head  string
		files int
		rest  string
		want  string
	}{
		"nothing":              {"", 0, "", "EOF"},
		"half a head":          {"nbdH\x00", 0, "", "unexpected EOF"},
		"another protocol":     {"xbdH\x00\x00\x00\x02\x00\x00\x00\x00", 0, "{}", "0x78626448"},
		"too long":             {"nbdH\x40\x00\x00\x01\x00\x00\x00\x00", 0, "{}", "is too much"},
		"too many":             {"nbdH\x00\x00\x00\x02\x00\x00\x02\x01", 0, "{}", "is too much"},
		"no descriptors":       {"nbdH\x00\x00\x00\x02\x00\x00\x00\x01", 0, "{}", "0 descriptors came, of 1"},
		"more descriptors":     {"nbdH\x00\x00\x00\x02\x00\x00\x00\x01", 2, "{}", "2 descriptors came, of 1"},
		"cut":                  {"nbdH\x00\x00\x00\x09\x00\x00\x00\x01", 1, "{}", "unexpected EOF"},
		"no document":          {"nbdH\x00\x00\x00\x02\x00\x00\x00\x02", 2, "[]", "is not understood"},
		"end in the midst":     {"nbdH\x00\x00\x00\x02\x00\x00\x00\x02", 0, "", "EOF"},
		"a document as it was": {"nbdH\x00\x00\x00\x02\x00\x00\x00\x01", 1, "{}", ""},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := passage(t)
			before := len(descriptors(t))
			if _, err := io.WriteString(ours, tt.head); err != nil {
				t.Fatal(err)
			}
			if tt.files > 0 {
				null, err := os.Open(os.DevNull)
				if err != nil {
					t.Fatal(err)
				}
				err = sendFiles(ours, []*os.File{null, null}[:tt.files])
				if err := errors.Join(err, null.Close()); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.WriteString(ours, tt.rest); err != nil {
				t.Fatal(err)
			}
			ours.CloseWrite()
			doc, files, err := receive(theirs)
			if tt.want == "" {
				if err != nil || len(files) != tt.files || files[0].Name() != os.DevNull {
					t.Errorf("%+v, %d files, %v", doc, len(files), err)
				}
				closeAll(files)
			} else if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%+v, %d files, %v", doc, len(files), err)
			}
			if open := descriptors(t); len(open) != before {
				t.Errorf("there were %d descriptors, and now are %q", before, open)
			}
		})
	}
}

// TestDocument holds how a document is written, which later versions must understand.
func TestDocument(t *testing.T) {
	served := Document{
		Version: 1, Index: 3, Incarnation: 7, Identifier: "x", Size: 4096, BlockSize: 512, Flags: 1,
		Timeout: time.Second, DeadTimeout: time.Minute, Leased: true, Note: json.RawMessage(`[1]`),
		Connections: []HandedConnection{{Unread: []byte{1, 2}}, {Dead: true}},
		Lost:        &HandedLoss{Number: 1, Unsent: "gone"},
	}
	served.Connections[0].Stats.Read.Requests = 5
	remote := Document{
		Version: 2, Index: 3, Incarnation: 7, Identifier: "x", Size: 4096, BlockSize: 512, Flags: 5,
		Timeout: time.Second, DeadTimeout: time.Minute, Note: json.RawMessage(`[1]`), Remote: true, Replaced: 4,
		Connections: []HandedConnection{
			{}, {Dead: true, DeadSince: time.Date(2026, 12, 1, 10, 20, 30, 500_000_000, time.UTC)},
		},
	}
	for name, doc := range map[string]Document{"document": served, "document_remote": remote} {
		b, err := os.ReadFile("testdata/" + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		var got Document
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(doc, got); diff != "" {
			t.Errorf("%s, as an earlier version has written it (-want +got):\n%s", name, diff)
		}
		if err := got.check(3); err != nil {
			t.Error(err)
		}
		b, err = json.Marshal(doc)
		told := bytes.Contains(b, []byte("remote")) && bytes.Contains(b, []byte("dead_since"))
		if err != nil || told != doc.Remote || bytes.Contains(b, []byte("replaced")) != doc.Remote {
			t.Errorf("%s is written %s, %v", name, b, err)
		}
	}
}
