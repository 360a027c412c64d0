package kind

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/server"
)

// TestAbsoluteURI holds that a URI means the same in another directory.
func TestAbsoluteURI(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for arg, want := range map[string]string{
		"nbd://example.com":           "nbd://example.com/",
		"nbd+unix:///x?socket=/run/s": "nbd+unix:///x?socket=/run/s",
		"nbd+unix:///x?socket=s":      "nbd+unix:///x?socket=" + dir + "/s",
		"nbd+unix:///?socket=%00s":    "nbd+unix:///?socket=%00s",
		"nbds://example.com/x?tls-certificates=../pki": "nbds://example.com/x?tls-certificates=" +
			filepath.Dir(dir) + "/pki",
	} {
		if got, err := AbsoluteURI(arg); err != nil || got != want {
			t.Errorf("%s became %s: %v, want %s", arg, got, err, want)
		}
	}
}

// TestOpenRemote holds what becomes a device of an export, and what the user is warned of.
func TestOpenRemote(t *testing.T) {
	m, err := memory.New(10_000, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e, err := server.NewExport(m, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{"x": e}}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		s.Close()
		<-served
		m.Close()
	}()
	spec := host.Spec{Kind: Remote, Arg: "nbd://" + l.Addr().String() + "/x", Connections: 2}
	spec.DeadTimeout = 5 * time.Second
	direct, err := Open(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if far := direct.Remote.Export; direct.Backend != nil || far == nil || far.Size() != 9728 ||
		len(direct.Warnings) != 1 || direct.Remote.Wait != 5*time.Second {
		t.Errorf("direct: %+v, warnings %q", direct.Remote, direct.Warnings)
	}
	if err := direct.Close(); err != nil {
		t.Error(err)
	}
	for way, want := range map[string]string{"direct": "an export is served here", "far": "the ways are"} {
		spec.Options = []string{"way=" + way}
		if _, err := OpenExport(t.Context(), spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("an export by %s: %v", way, err)
		}
	}
	spec.Options = []string{"way=relay"}
	for _, export := range []bool{false, true} {
		b, err := open(t.Context(), spec, export)
		if err != nil {
			t.Fatal(err)
		}
		size, warnings := int64(10_000)&^511, 1 // A device has whole blocks.
		if export {
			size, warnings = 10_000, 0
		}
		if b.Backend.Size() != size || len(b.Warnings) != warnings {
			t.Errorf("%d bytes, warnings %q", b.Backend.Size(), b.Warnings)
		}
		st := b.Remote.State(nil)
		if b.Remote.Export != nil {
			t.Error("the kernel is to speak with the server")
		}
		if st.Way != "relay" || st.Alive != 2 || st.Connections != 2 || st.Replies != "extended" || st.TLS ||
			st.Error != nil || b.Remote.Wait != 5*time.Second {
			t.Errorf("the remote is %+v, and requests wait %v", st, b.Remote.Wait)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	spec.Size = 1 << 20
	if _, err := Open(t.Context(), spec); exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), "has 9728 bytes") {
		t.Errorf("another size: %v", err)
	}
	spec.Arg, spec.Size = strings.Replace(spec.Arg, "/x", "/no", 1), 0
	var coded *exit.Error
	if _, err := Open(t.Context(), spec); !errors.As(err, &coded) || coded.Code != exit.NotFound {
		t.Errorf("no such export: %v", err)
	}
}
