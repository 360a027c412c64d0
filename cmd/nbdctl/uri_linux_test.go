package main

import (
	"encoding/json"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestServeURI pastes what serve prints into the field's clients.
func TestServeURI(t *testing.T) {
	tools(t, "nbdinfo", "qemu-img")
	dir := shortDir(t)
	type listen struct{ address, name string }
	all := []listen{
		{"unix:" + filepath.Join(dir, "s"), ""},
		{"unix:" + filepath.Join(dir, "a b&c+d%e?f#g"), "x"},
		{"unix:" + filepath.Join(dir, "ü'\"\n;=,"), "a&b+c%d?e#f g"},
		{"unix:relative", "ü/€"},
		{"unix:@x", ";=,:@$!*()"},
		{"tcp:127.0.0.1:0", "a/../b"},
		{"tcp:0.0.0.0:0", "100%"},
		{"tcp:localhost:0", strings.Repeat("ü", 2048)},
	}
	if hasIPv6() {
		all = append(all, listen{"tcp:[::1]:0", "x"}, listen{"tcp:[::]:0", "x"}, listen{"tcp::0", "x"})
	}
	if zoned := linkLocal(t); zoned != "" {
		all = append(all, listen{"tcp:[" + zoned + "]:0", "x"})
	}
	for _, tt := range all {
		cmd := nbdctlCommand(t, "serve", "memory", "--size", "3M", "--listen", tt.address, "--name", tt.name)
		cmd.Dir = dir
		uri := started(t, cmd)
		if c := dial(t, uri); c.size != 3<<20 {
			t.Errorf("%s has %d bytes", uri, c.size)
		}
		r := finish(t, command(t, "nbdinfo", "--json", uri))
		var info struct {
			Exports []struct {
				Name string `json:"export-name"`
				Size int64  `json:"export-size"`
			} `json:"exports"`
		}
		// It prints names of non-ASCII bytes as they are, and is no judge of what is long.
		if err := json.Unmarshal([]byte(r.stdout), &info); r.code != 0 || err != nil || len(info.Exports) != 1 {
			t.Errorf("nbdinfo %s: %d, %v, %s%s", uri, r.code, err, r.stdout, r.stderr)
		} else if e := info.Exports[0]; e.Name != tt.name || e.Size != 3<<20 {
			t.Errorf("nbdinfo %s: export %q of %d bytes", uri, e.Name, e.Size)
		}
		r = finish(t, command(t, "qemu-img", "info", uri))
		if r.code != 0 || !strings.Contains(r.stdout, "3145728 bytes") {
			t.Errorf("qemu-img info %s: %d, %s%s", uri, r.code, r.stdout, r.stderr)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		if tt.address == "unix:@x" {
			if _, err := os.Lstat(filepath.Join(dir, "@x")); err != nil {
				t.Errorf("unix:@x is no file: %v", err)
			}
		}
	}
}

func hasIPv6() bool {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err == nil {
		l.Close()
	}
	return err == nil
}

// linkLocal returns an address of this machine with its zone, if there is one.
func linkLocal(t testing.TB) string {
	t.Helper()
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if ok && n.IP.To4() == nil && n.IP.IsLinkLocalUnicast() && i.Flags&net.FlagUp != 0 {
				return n.IP.String() + "%" + i.Name
			}
		}
	}
	return ""
}

// TestServeFamilies holds that an address means its own family: the wildcard of IPv4
// does not take IPv6 clients, nor the other way round; without an address both are taken.
func TestServeFamilies(t *testing.T) {
	if !hasIPv6() {
		t.Skip("no IPv6 here")
	}
	for _, tt := range []struct {
		address string
		v4, v6  bool
	}{
		{"tcp:0.0.0.0:0", true, false},
		{"tcp:[::]:0", false, true},
		{"tcp::0", true, true},
	} {
		cmd := nbdctlCommand(t, "serve", "memory", "--size", "1M", "--listen", tt.address)
		u, err := url.Parse(started(t, cmd))
		if err != nil {
			t.Fatal(err)
		}
		for host, want := range map[string]bool{"127.0.0.1": tt.v4, "::1": tt.v6} {
			nc, err := net.Dial("tcp", net.JoinHostPort(host, u.Port()))
			if err == nil {
				nc.Close()
			}
			if (err == nil) != want {
				t.Errorf("%s at %s: %v", tt.address, host, err)
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
	}
}
