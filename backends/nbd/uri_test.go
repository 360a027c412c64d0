package nbd_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestParseURI holds what the URI document has, section by section, and what is refused.
func TestParseURI(t *testing.T) {
	tcp := func(address, export string) nbd.URI { return nbd.URI{Network: "tcp", Address: address, Export: export} }
	unix := func(path, export string) nbd.URI { return nbd.URI{Network: "unix", Address: path, Export: export} }
	with := func(u nbd.URI, change func(*nbd.URI)) nbd.URI {
		u.TLS = true
		change(&u)
		return u
	}
	for s, want := range map[string]nbd.URI{
		// "NBD URI export name"
		"nbd://example.com/disk":           tcp("example.com:10809", "disk"),
		"nbd+unix:///disk?socket=sock":     unix("sock", "disk"),
		"nbd://example.com/":               tcp("example.com:10809", ""),
		"nbd://example.com":                tcp("example.com:10809", ""),
		"nbd://example.com//disk":          tcp("example.com:10809", "/disk"),
		"nbd://example.com/hello%20world":  tcp("example.com:10809", "hello world"),
		"nbd://example.com/a/b%2Fc%3Fd+e":  tcp("example.com:10809", "a/b/c?d+e"),
		"nbd://example.com/%E2%98%BA%23":   tcp("example.com:10809", "☺#"),
		"NBD://example.com/Disk":           tcp("example.com:10809", "Disk"),
		"nbd://[fe80::1%25eth0]:1234/disk": tcp("[fe80::1%eth0]:1234", "disk"),
		// "NBD URI authority"
		"nbd://example.com:10810/": tcp("example.com:10810", ""),
		"nbd://[::1]":              tcp("[::1]:10809", ""),
		"nbd://[::1]:10810/x":      tcp("[::1]:10810", "x"),
		"nbd://192.0.2.1:1/x":      tcp("192.0.2.1:1", "x"),
		// "NBD URI socket parameter"
		"nbd+unix:///?socket=nbd.sock":     unix("nbd.sock", ""),
		"nbd+unix://?socket=/run/x":        unix("/run/x", ""),
		"nbd+unix:///?socket=%00/abstract": unix("@/abstract", ""),
		"nbd+unix:///?socket=@name":        unix("./@name", ""),
		"nbd+unix:///x?socket=/a%26b=c+d":  unix("/a&b=c+d", "x"),
		// "NBD URI query parameters related to TLS"
		"nbds://example.com/x": with(tcp("example.com:10809", "x"), func(u *nbd.URI) {}),
		"nbds+unix:///x?socket=/s&tls-hostname=h&tls-verify-peer=0&tls-type=x509": with(unix("/s", "x"),
			func(u *nbd.URI) { u.Hostname, u.Unverified = "h", true }),
		"nbds://example.com?tls-certificates=/etc/pki&tls-verify-peer=1": with(tcp("example.com:10809", ""),
			func(u *nbd.URI) { u.Certificates = "/etc/pki" }),
		// libnbd's
		"nbd+vsock:///x":         {Network: "vsock", Address: "2:10809", Export: "x"},
		"nbd+vsock://5:1234/x":   {Network: "vsock", Address: "5:1234", Export: "x"},
		"nbds+vsock://4294967:1": {Network: "vsock", Address: "4294967:1", TLS: true},
	} {
		got, err := nbd.ParseURI(s)
		if err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", s, diff)
		}
		again, err := nbd.ParseURI(got.String())
		if strings.Contains(s, "@") { // It became a path.
			continue
		}
		if diff := cmp.Diff(want, again); err != nil || diff != "" {
			t.Errorf("%s is written %s: %v (-want +got):\n%s", s, got, err, diff)
		}
	}
	for s, why := range map[string]string{
		"":                                         "scheme",
		"disk.img":                                 "scheme",
		"http://example.com/":                      "scheme",
		"nbdx://example.com/":                      "scheme",
		"nbd+ssh://example.com/":                   `no "ssh"`,
		"nbd+://example.com/":                      `no ""`,
		"nbd:example.com":                          "//",
		"nbd:///x":                                 "the host is missing",
		"nbd://:10809/x":                           "the host is missing",
		"nbd://example.com:/x":                     "the port is missing",
		"nbd://example.com:0/x":                    "no TCP port",
		"nbd://example.com:65536/x":                "no TCP port",
		"nbd://example.com:99999999999/x":          "is no port",
		"nbd://example.com:nbd/x":                  "invalid port",
		"nbd://::1/x":                              "in brackets",
		"nbd://[::1/x":                             "missing ']'",
		"nbd://[example.com]/x":                    "example.com",
		"nbd://example.com/%zz":                    "invalid URL escape",
		"nbd://example.com/a%00b":                  "zero byte",
		"nbd://example.com/%ff":                    "not UTF-8",
		"nbd://example.com/" + long(4097):          "no string above 4096",
		"nbd://example.com/x#y":                    "fragment",
		"nbd://example.com/x#":                     "fragment",
		"nbd://alice@example.com/x":                "user name",
		"nbd://alice:secret@example.com/x":         "user name",
		"nbd://example.com/x?socket=/s":            "socket",
		"nbd+unix:///x":                            "socket",
		"nbd+unix:///x?socket=":                    "socket",
		"nbd+unix://example.com/x?socket=/s":       "no host",
		"nbd+unix:///x?socket=/a%00b":              "zero byte",
		"nbd+unix:///x?socket=%zz":                 "parameter socket",
		"nbd+unix:///x?socket=/a&socket=/b":        "twice",
		"nbd://example.com/x?tls-hostname=h":       "for nbds",
		"nbds://example.com/x?tls-verify-peer=no!": "0 or 1",
		"nbds://example.com/x?tls-type=psk":        "not supported",
		"nbds://example.com/x?tls-username=alice":  "unknown parameter",
		"nbd://example.com/x?timeout=3":            "unknown parameter",
		"nbd://example.com/x?x-y":                  "unknown parameter",
		"nbd+vsock://host/x":                       "number of a machine",
		"nbd+vsock://4294967296/x":                 "number of a machine",
	} {
		u, err := nbd.ParseURI(s)
		if err == nil {
			t.Errorf("%.60q became %+v", s, u)
		} else if !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%.60q: %v; want %q", s, err, why)
		}
	}
}

func long(n int) string { return strings.Repeat("x", n) }

// FuzzParseURI holds that a URI that is understood is written so that it says the same again.
func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"nbd://example.com/disk", "nbds+unix:///a?socket=/s&tls-certificates=d", "nbd+vsock://2:1/x", "nbd://[::1%25a]",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := nbd.ParseURI(s)
		if err != nil {
			return
		}
		again, err := nbd.ParseURI(u.String())
		if err != nil || again != u {
			t.Errorf("%q is %+v, which is written %q, which is %+v: %v", s, u, u.String(), again, err)
		}
	})
}
