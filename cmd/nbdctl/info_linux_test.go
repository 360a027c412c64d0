package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/survey"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// peer runs another server until the test ends, on a socket that it makes once it is ready.
func peer(t *testing.T, socket string, argv ...string) {
	t.Helper()
	cmd := command(t, argv[0], argv[1:]...)
	stderr := new(lockedBuffer)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	eventually(t, func() bool {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err == nil
	}, "%v: %s", argv, stderr)
}

// informed is what info prints of a URI.
func informed(t *testing.T, uri string) survey.Server {
	t.Helper()
	var s survey.Server
	if err := json.Unmarshal([]byte(must(t, "info", "--json", uri)), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// mapped is what info prints of the extents of an export, in short.
func mapped(t *testing.T, uri, context string) string {
	t.Helper()
	var pieces []survey.Piece
	if err := json.Unmarshal([]byte(must(t, "info", "--json", "--map", context, uri)), &pieces); err != nil {
		t.Fatal(err)
	}
	var s strings.Builder
	for _, p := range pieces {
		fmt.Fprintf(&s, "%d+%d %s\n", p.Offset, p.Length, orDash(p.Meaning))
	}
	return s.String()
}

// TestInfo holds what a server of ours tells, over TLS, too, and of several exports.
func TestInfo(t *testing.T) {
	dir := t.TempDir()
	a := certs.New(t)
	a.Write(t, dir)
	image := filepath.Join(dir, "image")
	sh(t, "truncate -s 1M "+image+" && printf x | dd of="+image+" bs=1 seek=65536 conv=notrunc status=none")
	file := filepath.Join(dir, "exports.json")
	definitions := `{"version": 1, "exports": [
		{"name": "disk", "kind": "file", "arg": "image", "description": "a disk"},
		{"name": "x y", "kind": "memory", "size": "2M", "read_only": true, "block_size": 4096}]}`
	if err := os.WriteFile(file, []byte(definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	_, uri, _ := servedFor(t, "--exports", file, "--listen", "tcp:localhost:0", "--tls-certificates", dir,
		"--tls-verify-peer")
	address, _, _ := strings.Cut(strings.TrimPrefix(uri, "nbds://127.0.0.1:"), "/")
	at := func(rest string) string { return "nbds://localhost:" + address + rest + "?tls-certificates=" + dir }

	description, version := "a disk", "TLS 1.3"
	disk := survey.Export{
		Name: "disk", Description: &description, Size: 1 << 20,
		Flags:     []string{"flush", "fua", "trim", "write-zeroes", "df", "multi-conn", "cache", "fast-zero"},
		BlockSize: &survey.BlockSizes{Minimum: 1, Preferred: 4096, Maximum: 32 << 20},
		Contexts:  []string{"base:allocation"},
	}
	xy := survey.Export{
		Name: "x y", Size: 2 << 20, ReadOnly: true, Flags: []string{"df", "multi-conn", "cache"},
		BlockSize: &survey.BlockSizes{Minimum: 4096, Preferred: 4096, Maximum: 32 << 20},
		Contexts:  []string{"base:allocation"},
	}
	for uri, exports := range map[string][]survey.Export{at("/disk"): {disk}, at("/x%20y"): {xy}, at(""): {disk, xy}} {
		got := informed(t, uri)
		shown := strings.Replace(uri, address+"?", address+"/?", 1)
		want := survey.Server{URI: shown, TLS: &version, Replies: "extended", Exports: exports}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", uri, diff)
		}
	}
	if got := must(t, "info", at("/x%20y")); !strings.Contains(got, "\nexport \"x y\"\n") ||
		!strings.Contains(got, "at least 4096, better 4096, at most 33554432") {
		t.Errorf("for people it is:\n%s", got)
	}
	const stored = "0+65536 hole,zero\n65536+4096 data\n69632+978944 hole,zero\n"
	if got := mapped(t, at("/disk"), "base:allocation"); got != stored {
		t.Errorf("the map of the disk is\n%s, want\n%s", got, stored)
	}

	stranger, none := t.TempDir(), t.TempDir()
	certs.New(t).Write(t, stranger)
	sh(t, "cp "+dir+"/ca-cert.pem "+none)
	with := func(dir string) string { return strings.Replace(at("/disk"), dir0(at("/disk")), dir, 1) }
	for _, tt := range []struct {
		uri  string
		code exit.Code
		says string
	}{
		{at("/no"), exit.NotFound, `export "no": nbd: the server refuses NBD_OPT_INFO: no such export`},
		{"nbd://localhost:" + address + "/disk", exit.Permission, "TLS is required"},
		{with(stranger), exit.Permission, "certificate signed by unknown authority"},
		{with(none), exit.Permission, "remote error: tls: "},
		{at("/disk") + "&tls-hostname=example.com", exit.Permission, "not example.com"},
		{with(filepath.Join(dir, "no")), exit.Failure, "no such file or directory"},
		{"nbd://localhost:1/disk", exit.Failure, "connection refused"},
		{"nbd://localhost", exit.Failure, ""}, // Nobody listens at the default port, as a rule.
		{"http://localhost", exit.Usage, "its scheme must be one of"},
		{at("/disk") + "&timeout=3", exit.Usage, `unknown parameter "timeout"`},
	} {
		r := nbdctl(t, "info", tt.uri)
		if r.code != int(tt.code) || r.stdout != "" || !strings.Contains(r.stderr, tt.says) {
			t.Errorf("%s: exit code %d, want %d: %s%s; want %q", tt.uri, r.code, tt.code, r.stdout, r.stderr, tt.says)
		}
	}
	r := nbdctl(t, "info", "--map", "x:y", at("/disk"))
	if r.code != int(exit.NotFound) || !strings.Contains(r.stderr, `no meta context "x:y"`) {
		t.Errorf("a context that is not there: %d, %s", r.code, r.stderr)
	}
}

// dir0 is the folder of certificates of a URI.
func dir0(uri string) string {
	_, dir, _ := strings.Cut(uri, "tls-certificates=")
	return dir
}

// TestInfoStrangers has info ask who is no NBD server, and one that says nothing.
func TestInfoStrangers(t *testing.T) {
	for name, says := range map[string]string{
		"SSH-2.0-OpenSSH_9.2 and so on\r\n": "magic",
		"":                                  "has not answered within 1s",
	} {
		l, err := net.Listen("tcp", "localhost:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			if nc, err := l.Accept(); err == nil {
				defer nc.Close()
				nc.Write([]byte(name))
				nc.Read(make([]byte, 1)) // until the client has gone
			}
		}()
		r := nbdctl(t, "info", "--timeout", "1s", "nbd://"+l.Addr().String())
		if r.code != int(exit.Failure) || !strings.Contains(r.stderr, says) {
			t.Errorf("who says %q: %d, %s", name, r.code, r.stderr)
		}
	}
}

// TestInfoQemu holds what info tells of an image that qemu-nbd serves, with its dirty bitmap.
func TestInfoQemu(t *testing.T) {
	tools(t, "qemu-nbd", "qemu-img", "qemu-io")
	dir := shortDir(t)
	socket := filepath.Join(dir, "s")
	at := func(export string) string { return "nbd+unix:///" + export + "?socket=" + socket }
	image := filepath.Join(dir, "b.qcow2")
	sh(t, "qemu-img create -q -f qcow2 "+image+" 64M && qemu-img bitmap --add "+image+" b0 && "+
		"qemu-io -c 'write -P 7 1M 64k' -c 'write -P 8 10M 128k' "+image)
	peer(t, socket, "qemu-nbd", "-t", "-r", "-x", "disk", "-D", "an image", "-k", socket, "-B", "b0", "-A", image)
	got := informed(t, at(""))
	description := "an image"
	want := survey.Server{URI: at(""), Replies: got.Replies, Exports: []survey.Export{{
		Name: "disk", Description: &description, Size: 64 << 20, ReadOnly: true,
		Flags:     []string{"flush", "fua", "df", "cache"},
		BlockSize: &survey.BlockSizes{Minimum: 1, Preferred: 4096, Maximum: 32 << 20},
		Contexts:  []string{"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"},
	}}}
	if len(got.Exports) == 1 { // Newer ones promise that connections agree.
		got.Exports[0].Flags = slices.DeleteFunc(got.Exports[0].Flags, func(f string) bool { return f == "multi-conn" })
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("qemu-nbd (-want +got):\n%s", diff)
	}
	pattern := func(empty, written string) string {
		return fmt.Sprintf("0+1048576 %s\n1048576+65536 %s\n1114112+9371648 %[1]s\n10485760+131072 %[2]s\n"+
			"10616832+56492032 %[1]s\n", empty, written)
	}
	for context, want := range map[string]string{
		"qemu:dirty-bitmap:b0":  pattern("clean", "dirty"),
		"qemu:allocation-depth": pattern("unallocated", "local"),
		"base:allocation":       pattern("hole,zero", "data"),
	} {
		if got := mapped(t, at("disk"), context); got != want {
			t.Errorf("qemu-nbd's %s is\n%swant\n%s", context, got, want)
		}
	}
}
