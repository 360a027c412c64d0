//go:build interop

package nbd_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/blocksize"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// A peer is a server of others.
type peer struct {
	argv    []string // {socket}, {image}, {certificates} and {config} are replaced
	config  string
	export  string
	tls     bool
	zeroes  bool // what was trimmed reads as zeroes
	options nbd.Options
	agreed  func(nbd.Agreement) bool
}

const imageSize = 8 << 20

// peers are in the forms that each of them has. That of extended headers is QEMU's alone, from 9
// on.
func peers() map[string]peer {
	qemu := []string{"qemu-nbd", "-t", "-e", "16", "--discard=unmap", "--detect-zeroes=off", "-f", "raw",
		"-k", "{socket}", "-x", "disk", "{image}"}
	kit := func(argv ...string) []string {
		return append([]string{"nbdkit", "-f", "-U", "{socket}"}, argv...)
	}
	sizes := func(want wire.BlockSizes) func(nbd.Agreement) bool {
		return func(a nbd.Agreement) bool { return a.BlockSizes == want }
	}
	structured := func(a nbd.Agreement) bool { return a.Structured && !a.Extended }
	simple := func(a nbd.Agreement) bool { return !a.Structured }
	all := map[string]peer{
		"qemu-nbd": {argv: qemu, export: "disk", agreed: func(a nbd.Agreement) bool { return a.Structured }},
		"qemu-nbd structured": {argv: qemu, export: "disk", options: nbd.Options{NoExtended: true},
			agreed: structured},
		"qemu-nbd simple": {argv: qemu, export: "disk", options: nbd.Options{NoStructured: true}, agreed: simple},
		"qemu-nbd several": {argv: qemu, export: "disk", options: nbd.Options{Connections: 4},
			agreed: func(a nbd.Agreement) bool { return a.Flags&wire.FlagCanMultiConn != 0 }},
		"nbdkit":        {argv: kit("memory", "8M"), zeroes: true, agreed: structured},
		"nbdkit simple": {argv: kit("--no-sr", "memory", "8M"), zeroes: true, agreed: simple},
		"nbdkit several": {argv: kit("memory", "8M"), zeroes: true, options: nbd.Options{Connections: 4},
			agreed: structured},
		"nbdkit TLS": {
			argv: kit("--tls=require", "--tls-certificates={certificates}", "--tls-verify-peer", "memory", "8M"),
			tls:  true, zeroes: true, agreed: func(a nbd.Agreement) bool { return a.TLS },
		},
		"nbdkit without GO": {argv: kit("--mask-handshake=0", "memory", "8M"), zeroes: true, agreed: simple},
		"nbdkit slow": {argv: kit("--filter=delay", "memory", "8M", "delay-read=1ms", "delay-write=1ms"),
			zeroes: true, agreed: structured},
		"nbd-server": {argv: []string{"nbd-server", "-p", "{socket}.pid", "-C", "{config}"}, export: "disk",
			agreed: simple, config: "[generic]\nunixsock = {socket}\n" +
				"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"},
	}
	for _, b := range []wire.BlockSizes{
		{Minimum: 1, Preferred: 512, Maximum: 4096}, {Minimum: 512, Preferred: 4096, Maximum: 65536},
		{Minimum: 4096, Preferred: 65536, Maximum: 1 << 20}, {Minimum: 65536, Preferred: 65536, Maximum: 1<<32 - 1},
	} {
		all[fmt.Sprintf("nbdkit %d-%d-%d", b.Minimum, b.Preferred, b.Maximum)] = peer{
			argv: kit("--filter=blocksize-policy", "memory", "8M", fmt.Sprintf("blocksize-minimum=%d", b.Minimum),
				fmt.Sprintf("blocksize-preferred=%d", b.Preferred), fmt.Sprintf("blocksize-maximum=%d", b.Maximum),
				"blocksize-error-policy=error"),
			zeroes: true, agreed: sizes(b),
		}
	}
	return all
}

// start starts the server, and returns where it is.
func (p peer) start(t testing.TB, certificates string) nbd.URI {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, image, config := filepath.Join(dir, "s"), filepath.Join(dir, "image"), filepath.Join(dir, "config")
	fill := strings.NewReplacer("{socket}", socket, "{image}", image, "{config}", config,
		"{certificates}", certificates)
	if err := os.WriteFile(config, []byte(fill.Replace(p.config)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, imageSize); err != nil {
		t.Fatal(err)
	}
	argv := make([]string, len(p.argv))
	for i := range argv {
		argv[i] = fill.Replace(p.argv[i])
	}
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if pid, err := os.ReadFile(socket + ".pid"); err == nil {
			exec.Command("kill", strings.TrimSpace(string(pid))).Run()
		}
		cmd.Process.Kill()
		cmd.Wait()
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-tick.C {
		if nc, err := net.Dial("unix", socket); err == nil {
			nc.Close()
			u := nbd.URI{Network: "unix", Address: socket, Export: p.export}
			if p.tls {
				u.TLS, u.Certificates, u.Hostname = true, certificates, "localhost"
			}
			return u
		}
	}
	t.Fatalf("%v does not listen", argv)
	return nbd.URI{}
}

// TestInterop has exports of the field's servers pass as backends.
func TestInterop(t *testing.T) {
	dir := t.TempDir()
	certs.New(t).Write(t, dir)
	for name, p := range peers() {
		t.Run(name, func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				c := dial(t, p.start(t, dir), p.options)
				if a := c.Agreement(); !p.agreed(a) || c.Connections() != max(p.options.Connections, 1) {
					t.Fatalf("%d connections, agreed on %+v", c.Connections(), a)
				}
				return c
			}, backendtest.Options{TrimZeroes: p.zeroes, Operations: 100})
		})
	}
}

// TestInteropBlocks has smaller blocks than nbdkit takes, which refuses what is not aligned.
func TestInteropBlocks(t *testing.T) {
	for name, p := range peers() {
		if !strings.HasPrefix(name, "nbdkit 4096") && !strings.HasPrefix(name, "nbdkit 65536") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				c := dial(t, p.start(t, ""), p.options)
				if a := c.Agreement(); !p.agreed(a) {
					t.Fatalf("agreed on %+v", a)
				}
				b, err := blocksize.New(c, 512)
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, backendtest.Options{Operations: 100})
		})
	}
}

// TestInteropErrors has nbdkit fail as long as a file is there: each error reaches who has asked,
// and the connection goes on.
func TestInteropErrors(t *testing.T) {
	failing := filepath.Join(t.TempDir(), "failing")
	p := peer{argv: []string{"nbdkit", "-f", "-U", "{socket}", "--filter=error", "memory", "8M", "error=ENOSPC",
		"error-rate=100%", "error-file=" + failing}}
	u := p.start(t, "")
	for _, o := range []nbd.Options{{}, {NoStructured: true}} {
		c := dial(t, u, o)
		buf := make([]byte, 4096)
		requests := map[string]func() error{
			"read":    func() error { _, err := c.ReadAt(buf, 0); return err },
			"write":   func() error { _, err := c.WriteAt(buf, 4096); return err },
			"zero":    func() error { return c.Zero(0, 1<<20, 0) },
			"trim":    func() error { return c.Trim(0, 1<<20) },
			"extents": func() error { return c.Extents(0, 1<<20, func(backends.Extent) bool { return true }) },
		}
		if o.NoStructured {
			delete(requests, "extents")
		}
		for name, request := range requests {
			if err := request(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if err := os.WriteFile(failing, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := request(); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%s where there is no space: %v", name, err)
			}
			if err := os.Remove(failing); err != nil {
				t.Fatal(err)
			}
			if err := request(); err != nil {
				t.Errorf("%s afterwards: %v", name, err)
			}
		}
	}
}
