package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// servedFor is serveFor for a server that is ended with the test, if it still runs.
func servedFor(t *testing.T, args ...string) (*exec.Cmd, string, *lockedBuffer) {
	t.Helper()
	cmd, uri, stderr := serveFor(t, args...)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed, or ended before
	})
	return cmd, uri, stderr
}

// listedAt is what nbdinfo finds on a server: names, with sizes and descriptions.
func listedAt(t *testing.T, uri string) []string {
	t.Helper()
	var info struct {
		Exports []struct {
			Name        string `json:"export-name"`
			Description string
			Size        int64 `json:"export-size"`
			ReadOnly    bool  `json:"is_read_only"`
		}
	}
	if err := json.Unmarshal([]byte(sh(t, "nbdinfo --list --json '"+uri+"'")), &info); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range info.Exports {
		all = append(all, fmt.Sprintf("%s %d %q %v", e.Name, e.Size, e.Description, e.ReadOnly))
	}
	return all
}

// TestServeExports serves what a file defines, at two addresses, and reads it again.
func TestServeExports(t *testing.T) {
	tools(t, "nbdinfo", "nbdcopy", "qemu-io")
	dir := shortDir(t)
	file := filepath.Join(dir, "exports.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sh(t, "cd "+dir+"; mkdir images; truncate -s 2M disk.img; truncate -s 3M images/a.img images/.b")
	const format = `{"version": 1, "default": "disk", "exports": [
		{"name": "disk", "kind": "file", "arg": "disk.img", "description": "the first"},
		%s
		{"name": "scratch", "kind": "memory", "size": "1M"}
	], "folders": [{"path": "images", "prefix": "images/", "read_only": true}]}`
	write(fmt.Sprintf(format, ""))
	socket := filepath.Join(dir, "s")
	server, uri, stderr := servedFor(t, "--exports", file, "--listen", "unix:"+socket, "--listen", "tcp:127.0.0.1:0")
	if uri != "nbd+unix:///disk?socket="+socket {
		t.Errorf("the first URI is %s", uri)
	}
	base := "nbd+unix:///?socket=" + socket
	named := func(name string) string { return strings.Replace(base, "///", "///"+name, 1) }
	before := []string{`disk 2097152 "the first" false`, `scratch 1048576 "" false`, `images/a.img 3145728 "" true`}
	if diff := cmp.Diff(before, listedAt(t, base)); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	if got := sh(t, "nbdinfo --size '"+base+"'"); got != "2097152" {
		t.Errorf("the default one has %s bytes", got)
	}
	sh(t, "qemu-io -f raw -c 'write -P 7 4k 4k' '"+named("scratch")+"'")
	if r := finish(t, command(t, "nbdinfo", "--size", named("images/.b"))); r.code == 0 {
		t.Errorf("a hidden file is an export: %s", r.stdout)
	}

	hangup := func(awaited string) {
		t.Helper()
		if err := server.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		stderr.await(t, awaited)
	}
	write(strings.Replace(fmt.Sprintf(format, ""), `"scratch"`, `"scratch`, 1))
	hangup(`msg="not read again; exports stay as they are" err="` + file + `: line 4: `)
	write(fmt.Sprintf(format, `{"name": "gone", "kind": "file", "arg": "no.img"},`))
	hangup("--create --size SIZE makes it")
	if diff := cmp.Diff(before, listedAt(t, base)); diff != "" {
		t.Errorf("listed after files that can't be served (-want +got):\n%s", diff)
	}
	write(fmt.Sprintf(format, `{"name": "new", "kind": "memory", "size": 4096},`))
	hangup("read again")
	if diff := cmp.Diff([]string{before[0], `new 4096 "" false`, before[1], before[2]}, listedAt(t, base)); diff != "" {
		t.Errorf("listed afterwards (-want +got):\n%s", diff)
	}
	sh(t, "qemu-io -f raw -c 'read -P 7 4k 4k' '"+named("scratch")+"' | tee /dev/stderr | (! grep -i fail)")
	ends(t, server, syscall.SIGTERM)
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket of a server that has ended: %v", err)
	}

	write(`{"version": 1, "hidden": true, "exports": [{"name": "x", "kind": "memory", "size": 4096}]}`)
	_, uri, _ = servedFor(t, "--exports", file, "--listen", "unix:"+socket)
	if got := listedAt(t, base); len(got) > 0 || sh(t, "nbdinfo --size '"+uri+"'") != "4096" {
		t.Errorf("of a server that hides what it has %q is listed", got)
	}

	write("{}")
	r := nbdctl(t, "serve", "--exports", file, "--listen", "unix:"+socket+"2")
	if r.code != 2 || !strings.Contains(r.stderr, `"version" is 0`) {
		t.Errorf("a file that is none: %d, %s", r.code, r.stderr)
	}
}

// TestServeActivated starts a server with the socket that it is to serve, as systemd does.
func TestServeActivated(t *testing.T) {
	tools(t, "nbdinfo")
	path := filepath.Join(shortDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := nbdctlCommand(t, "serve", "memory", "--size", "1M")
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = []*os.File{f}
	uri := started(t, cmd)
	if uri != "nbd+unix:///?socket="+path || sh(t, "nbdinfo --size '"+uri+"'") != "1048576" {
		t.Errorf("it serves %s", uri)
	}
	ends(t, cmd, syscall.SIGTERM)
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket, which is not the server's: %v", err)
	}
}

// TestServeStats asks a server what its exports have served.
func TestServeStats(t *testing.T) {
	tools(t, "qemu-io", "nbdinfo")
	dir := shortDir(t)
	file, control := filepath.Join(dir, "exports.json"), filepath.Join(dir, "ctl")
	text := `{"version": 1, "exports": [{"name": "a", "kind": "memory", "size": "1M"},
		{"name": "b", "kind": "memory", "size": "2M"}], "folders": [{"path": "."}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	server, uri, _ := servedFor(t, "--exports", file, "--listen", "unix:"+filepath.Join(dir, "s"), "--control", control)
	sh(t, "qemu-io -f raw -c 'write 4k 4k' -c flush -c 'read 0 64k' -c 'read 0 64k' '"+uri+"'")
	sh(t, "nbdinfo --map '"+uri+"'")
	var all []statsView
	if err := json.Unmarshal([]byte(must(t, "stats", "--server", control, "--json")), &all); err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Name != "a" || all[1].Name != "b" || *all[0].Clients != 0 ||
		all[0].Total.Write.Bytes != 4096 || all[0].Total.Read.Bytes < 128<<10 || all[0].Total.Flush.Requests == 0 ||
		all[0].Total.BlockStatus.Requests == 0 || all[1].Total.Read.Requests != 0 {
		t.Errorf("stats: %+v", all)
	}
	if out := must(t, "stats", "--server", control, "a"); !containsAll(out, "a ", "write", "block status") {
		t.Errorf("stats of one:\n%s", out)
	}
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--server", control, "c"}, 3, `no export "c" is open; there are "a", "b"`},
		{[]string{"--server", control + "x"}, 3, "no server answers at"},
		{[]string{"--server", filepath.Join(dir, "s")}, 1, "--control"},
		{[]string{"--server", control, "a", "b"}, 2, "the name of one export or none"},
	} {
		r := nbdctl(t, append([]string{"stats"}, tt.args...)...)
		if r.code != tt.code || !strings.Contains(r.stderr, tt.says) {
			t.Errorf("stats %q: %d, %s", tt.args, r.code, r.stderr)
		}
	}
	ends(t, server, syscall.SIGTERM)
	if _, err := os.Stat(control); !os.IsNotExist(err) {
		t.Errorf("the control socket of a server that has ended: %v", err)
	}
}
