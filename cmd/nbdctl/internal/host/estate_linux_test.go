package host

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// pair returns the two ends of a connection between processes.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fa, fb, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	var conns []*net.UnixConn
	for _, f := range []*os.File{fa, fb} {
		c, err := unixConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { c.Close() })
		conns = append(conns, c)
	}
	return conns[0], conns[1]
}

// TestEstate sends an estate, and finds all of it at the other end, the files by what they are for.
func TestEstate(t *testing.T) {
	a, b := pair(t)
	e := &estate{
		Version: estateVersion, UUID: "u", Spec: Spec{Kind: "file", Arg: "/x", Restart: 3},
		Device: blockdev.Document{Version: blockdev.KeptDocumentVersion, Index: 7, Identifier: "i"},
	}
	if err := e.addSecrets(secret.Set{"key": secret.New("value")}); err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct{ kind, content string }{
		{passControl, "c"}, {passBackend, "b1"}, {passBackend, "b2"}, {passDevice, "d"},
	} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte(f.content), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		e.add(f.kind, file)
	}
	defer e.close()
	sent := make(chan error, 1)
	go func() { sent <- e.send(a) }()
	w, err := receiveWill(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	got := w.Estate
	defer got.close()
	contents := func(kind string) (all []string) {
		for _, f := range got.of(kind) {
			content, err := io.ReadAll(f)
			if err != nil {
				t.Error(err)
			}
			all = append(all, string(content))
		}
		return all
	}
	for kind, want := range map[string][]string{
		passControl: {"c"}, passBackend: {"b1", "b2"}, passDevice: {"d"}, passLock: nil,
	} {
		if diff := cmp.Diff(want, contents(kind)); diff != "" {
			t.Errorf("%s: %s", kind, diff)
		}
	}
	secrets, err := got.secrets()
	if err != nil || secrets["key"].Reveal() != "value" {
		t.Errorf("the secrets are %v, %v", secrets, err)
	}
	if got.UUID != e.UUID || got.Spec.Restart != 3 || got.Device.Index != 7 || got.Device.Identifier != "i" ||
		w.Released {
		t.Errorf("it is %+v", got)
	}
}

// TestEstateUnknown refuses an estate of another form.
func TestEstateUnknown(t *testing.T) {
	a, b := pair(t)
	go func() { _ = parcel.Send(a, will{Estate: &estate{Version: estateVersion + 1}}, nil) }()
	if w, err := receiveWill(b); w.Estate != nil || exit.Of(err) != exit.Unsupported {
		t.Errorf("%+v, %v", w, err)
	}
}

// TestBudget takes as much as there is in any ten minutes, and no more.
func TestBudget(t *testing.T) {
	var b budget
	at := time.Unix(0, 0)
	for n, step := range []struct {
		after time.Duration
		want  bool
	}{
		{0, true}, {time.Minute, true}, {time.Minute, false}, {8 * time.Minute, false}, {2 * time.Second, true},
		{time.Second, false}, {time.Minute, true}, {time.Hour, true},
	} {
		at = at.Add(step.after)
		if got := b.take(2, at); got != step.want {
			t.Errorf("step %d: %t", n, got)
		}
	}
}
