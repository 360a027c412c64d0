package nbd_test

import (
	"context"
	"crypto/tls"
	"net"
	"path/filepath"
	"testing"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/backendtest"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// serve serves b, and returns the URI of it.
func serve(t testing.TB, b backends.Backend, s *server.Server) nbd.URI {
	t.Helper()
	e, err := server.NewExport(b, server.Options{Description: "of a test"})
	if err != nil {
		t.Fatal(err)
	}
	s.Exports = map[string]*server.Export{"disk": e}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		<-served
	})
	return nbd.URI{Network: "unix", Address: path, Export: "disk"}
}

// dial connects, and has the client closed when the test ends.
func dial(t testing.TB, u nbd.URI, o nbd.Options) *nbd.Client {
	t.Helper()
	c, err := u.Dial(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newMemory(t testing.TB, size int64) backends.Backend {
	t.Helper()
	m, err := memory.New(size, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// TestConformance has a client for what a server of ours offers pass as a backend, in each form of
// replies, over several connections, and over TLS.
func TestConformance(t *testing.T) {
	authority := certs.New(t)
	for name, tt := range map[string]struct {
		options nbd.Options
		tls     bool
	}{
		"simple":     {options: nbd.Options{NoStructured: true}},
		"structured": {options: nbd.Options{NoExtended: true}},
		"extended":   {},
		"several":    {options: nbd.Options{Connections: 4, MaxInFlight: 3}},
		"tls":        {tls: true},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Test(t, func(t testing.TB) backends.Backend {
				s := new(server.Server)
				if tt.tls {
					s.TLS, s.RequireTLS = &tls.Config{Certificates: []tls.Certificate{authority.Server}}, true
					tt.options.TLS = &tls.Config{RootCAs: authority.Pool}
				}
				c := dial(t, serve(t, newMemory(t, 1<<20), s), tt.options)
				a := c.Agreement()
				if a.TLS != tt.tls || a.Extended != (!tt.options.NoExtended && !tt.options.NoStructured) {
					t.Fatalf("agreed on %+v", a)
				}
				return c
			}, backendtest.Options{TrimZeroes: true, Operations: 300})
		})
	}
}
