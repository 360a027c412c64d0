package blockdev

import (
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
			o.e.timeout = 500 * time.Millisecond // as far as the process knows
			old := o.adopt(t)
			o.half(t, 0)
			ours, theirs := passage(t)
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

// TestReceive holds what is no device.
func TestReceive(t *testing.T) {
	for name, stream := range map[string]string{
		"nothing":          "",
		"half a head":      "nbdH\x00",
		"another protocol": "NBDMAGICIHAVEOPT",
		"too long":         "nbdH\xff\xff\xff\xff\x00\x00\x00\x00",
		"too many":         "nbdH\x00\x00\x00\x02\x00\x00\xff\xff{}",
		"no descriptors":   "nbdH\x00\x00\x00\x02\x00\x00\x00\x01{}",
		"cut":              "nbdH\x00\x00\x00\x09\x00\x00\x00\x00{}",
		"no document":      "nbdH\x00\x00\x00\x02\x00\x00\x00\x00[]",
	} {
		ours, theirs := passage(t)
		if _, err := io.WriteString(ours, stream); err != nil {
			t.Fatal(err)
		}
		ours.Close()
		if doc, files, err := receive(theirs); err == nil || len(files) > 0 {
			t.Errorf("%s: %+v, %d files", name, doc, len(files))
		}
	}
}

// TestDocument holds how a document is written, which later versions must understand.
func TestDocument(t *testing.T) {
	doc := Document{
		Version: 1, Index: 3, Incarnation: 7, Identifier: "x", Size: 4096, BlockSize: 512, Flags: 1,
		Timeout: time.Second, DeadTimeout: time.Minute, Leased: true, Note: json.RawMessage(`[1]`),
		Connections: []HandedConnection{{Unread: []byte{1, 2}}, {Dead: true}},
		Lost:        &HandedLoss{Number: 1, Unsent: "gone"},
	}
	doc.Connections[0].Stats.Read.Requests = 5
	b, err := os.ReadFile("testdata/document.json")
	if err != nil {
		t.Fatal(err)
	}
	var got Document
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(doc, got); diff != "" {
		t.Errorf("what an earlier version has written (-want +got):\n%s", diff)
	}
}
