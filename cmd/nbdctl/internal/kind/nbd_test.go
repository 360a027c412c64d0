package kind

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
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

// TestOpenBlocks holds when a device has smaller blocks than the server takes, and what it says
// then.
func TestOpenBlocks(t *testing.T) {
	m, err := memory.New(1<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &server.Server{Exports: make(map[string]*server.Export)}
	for name, block := range map[string]int{"page": 4096, "large": 32 << 10} {
		if s.Exports[name], err = server.NewExport(m, server.Options{BlockSize: block}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		s.Close()
		<-served
		m.Close()
	}()
	for _, tt := range []struct {
		export, option string
		block, want    int
		served, direct bool
	}{
		{export: "page", want: 4096, direct: true},
		{export: "page", option: "way=relay", want: 4096},
		{export: "page", block: 512, want: 512},
		{export: "page", block: 4096, want: 4096, direct: true},
		{export: "large", want: 512},
		{export: "large", block: 2048, want: 2048},
		{export: "large", block: 32 << 10, want: 32 << 10},
		{export: "large", want: 32 << 10, served: true},
	} {
		spec := host.Spec{
			Kind: Remote, Arg: "nbd://" + l.Addr().String() + "/" + tt.export, Connections: 1, BlockSize: tt.block,
		}
		if tt.option != "" {
			spec.Options = []string{tt.option}
		}
		b, err := open(t.Context(), spec, tt.served)
		if err != nil {
			t.Errorf("%+v: %v", tt, err)
			continue
		}
		var got backends.BlockSizes
		if direct := b.Remote.Export != nil; direct != tt.direct {
			t.Errorf("%+v: direct is %v", tt, direct)
		} else if direct {
			got = b.Remote.Export.BlockSizes()
		} else {
			got = backends.Probe(b.Backend).BlockSizes
			if st := b.Remote.State(nil); st.BlockSize != 4096 && tt.export == "page" ||
				st.BlockSize != 32<<10 && tt.export == "large" {
				t.Errorf("%+v: the remote is %+v", tt, st)
			}
		}
		smaller := tt.want < 4096 || tt.export == "large" && tt.want < 32<<10
		if got.Minimum != tt.want || len(b.Warnings) == 1 != smaller {
			t.Errorf("%+v: %+v, warnings %q", tt, got, b.Warnings)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}
