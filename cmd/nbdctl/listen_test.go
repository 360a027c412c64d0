package main

import (
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestParseEndpoint holds what an address means. What is refused is among the usage errors.
func TestParseEndpoint(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for v, want := range map[string]endpoint{
		"unix:/run/disk.sock":         {"unix", "/run/disk.sock"},
		"unix:/run/a:b,c=d":           {"unix", "/run/a:b,c=d"},
		"unix:disk.sock":              {"unix", filepath.Join(wd, "disk.sock")},
		"unix:../x/./disk.sock":       {"unix", filepath.Join(filepath.Dir(wd), "x", "disk.sock")},
		"unix:@x":                     {"unix", filepath.Join(wd, "@x")},
		"unix:/" + long(106):          {"unix", "/" + long(106)},
		"tcp:localhost:10809":         {"tcp", "localhost:10809"},
		"tcp::0":                      {"tcp", ":0"},
		"tcp:0.0.0.0:65535":           {"tcp4", "0.0.0.0:65535"},
		"tcp:127.0.0.1:0":             {"tcp4", "127.0.0.1:0"},
		"tcp:[::]:0":                  {"tcp6", "[::]:0"},
		"tcp:[fe80::1%eth0]:10809":    {"tcp6", "[fe80::1%eth0]:10809"},
		"tcp:[::ffff:127.0.0.1]:1080": {"tcp", "[::ffff:127.0.0.1]:1080"},
	} {
		if got, err := parseEndpoint(v); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", v, got, err, want)
		}
	}
}

func long(n int) string { return strings.Repeat("x", n) }

// TestExportURI holds that what is printed leads back to the address and the name, also
// for who takes "+" for a space, or a URI to end at a quote, a space or an ampersand.
func TestExportURI(t *testing.T) {
	for _, tt := range []struct {
		addr net.Addr
		name string
		want string
	}{
		{&net.UnixAddr{Name: "/run/disk.sock", Net: "unix"}, "", "nbd+unix:///?socket=/run/disk.sock"},
		{
			&net.UnixAddr{Name: "/a b&c+d%e?f#g", Net: "unix"}, "a&b+c %d?e#f/ü",
			"nbd+unix:///a%26b%2Bc%20%25d%3Fe%23f%2F%C3%BC?socket=/a%20b%26c%2Bd%25e%3Ff%23g",
		},
		{
			&net.UnixAddr{Name: "/x/@x;=\n'\"", Net: "unix"}, "$(id)",
			"nbd+unix:///%24%28id%29?socket=/x/%40x%3B%3D%0A%27%22",
		},
		{&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 10809}, "disk", "nbd://192.0.2.1:10809/disk"},
		{&net.TCPAddr{IP: net.IPv4zero, Port: 1}, "", "nbd://127.0.0.1:1/"},
		{&net.TCPAddr{IP: net.IPv6unspecified, Port: 1}, "", "nbd://[::1]:1/"},
		{&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}, "", "nbd://[2001:db8::1]:1/"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Port: 1, Zone: "eth0"}, "a", "nbd://[fe80::1%25eth0]:1/a"},
	} {
		got := exportURI(tt.addr, tt.name, false)
		if got != tt.want {
			t.Errorf("%v, %q: %s, want %s", tt.addr, tt.name, got, tt.want)
		}
		u, err := url.Parse(got)
		if err != nil {
			t.Error(err)
			continue
		}
		if over := exportURI(tt.addr, tt.name, true); over != strings.Replace(got, "nbd", "nbds", 1) {
			t.Errorf("over TLS it is %s", over)
		}
		if name := strings.TrimPrefix(u.Path, "/"); name != tt.name {
			t.Errorf("%s names %q, want %q", got, name, tt.name)
		}
		if socket := u.Query().Get("socket"); u.Scheme == "nbd+unix" && socket != tt.addr.String() {
			t.Errorf("%s leads to %q, want %q", got, socket, tt.addr)
		}
		if tcp, ok := tt.addr.(*net.TCPAddr); ok && !tcp.IP.IsUnspecified() && u.Host != tcp.String() {
			t.Errorf("%s leads to %q, want %q", got, u.Host, tcp)
		}
	}
}
