//go:build interop

package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/survey"
)

// TestInteropInfo holds what info tells of nbdkit and nbd-server.
func TestInteropInfo(t *testing.T) {
	tools(t, "nbdkit", "nbd-server")
	dir := shortDir(t)
	socket := func(name string) string { return filepath.Join(dir, name) }
	at := func(name, export string) string { return "nbd+unix:///" + export + "?socket=" + socket(name) }

	peer(t, socket("k"), "nbdkit", "-f", "-U", socket("k"), "--filter=blocksize-policy", "memory", "8M",
		"blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M")
	e := informed(t, at("k", "")).Exports
	sizes := &survey.BlockSizes{Minimum: 4096, Preferred: 64 << 10, Maximum: 1 << 20}
	if len(e) != 1 || e[0].Size != 8<<20 || !cmp.Equal(e[0].BlockSize, sizes) || len(e[0].Contexts) != 1 {
		t.Errorf("nbdkit: %+v", e)
	}
	if got := mapped(t, at("k", ""), "base:allocation"); got != "0+8388608 hole,zero\n" {
		t.Errorf("nbdkit's map is\n%s", got)
	}

	// It has neither structured replies nor block sizes, and tells sizes only of what is opened.
	image := socket("image")
	sh(t, "truncate -s 3M "+image)
	// It cuts clients of a Unix socket whom it is to list exports for.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(address)
	config := fmt.Sprintf("[generic]\nlistenaddr = 127.0.0.1\nport = %s\nallowlist = true\n"+
		"[a]\nexportname = %s\n[b]\nexportname = %[2]s\nreadonly = true\n", port, image)
	if err := os.WriteFile(socket("conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, "nbd-server -p "+socket("pid")+" -C "+socket("conf")) // It goes on in the background.
	defer sh(t, "kill $(cat "+socket("pid")+")")
	e = informed(t, "nbd://"+address).Exports
	if len(e) != 2 || e[0].Size != 3<<20 || e[1].Size != 3<<20 || e[0].ReadOnly || !e[1].ReadOnly ||
		e[0].BlockSize != nil {
		t.Errorf("nbd-server: %+v", e)
	}
}
