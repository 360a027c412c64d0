package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/testdata/certs"
)

// meet has a client that has the certificates of dir begin TLS with a server, and returns how that
// ends for both.
func meet(t *testing.T, dir string, server *tls.Config) (ours, theirs error) {
	t.Helper()
	config, err := Client(dir)
	if err != nil {
		t.Fatal(err)
	}
	config.ServerName = "localhost"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan error)
	go func() {
		nc, err := l.Accept()
		if err == nil {
			err = tls.Server(nc, server).Handshake()
			nc.Close()
		}
		ended <- err
	}()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := tls.Client(nc, config)
	if ours = client.Handshake(); ours == nil {
		_, _ = io.Copy(io.Discard, client) // Over TLS 1.3 the server may still refuse it.
	}
	nc.Close()
	return ours, <-ended
}

// TestClient holds whom a client trusts, and that it shows its certificate to who asks for it.
func TestClient(t *testing.T) {
	dir := t.TempDir()
	a, stranger := certs.New(t), certs.New(t)
	a.Write(t, dir)
	asking := &tls.Config{
		Certificates: []tls.Certificate{a.Server}, ClientCAs: a.Pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
	if ours, theirs := meet(t, dir, asking); ours != nil || theirs != nil {
		t.Errorf("with a certificate: %v, and %v", ours, theirs)
	}
	var unknown x509.UnknownAuthorityError
	ours, _ := meet(t, dir, &tls.Config{Certificates: []tls.Certificate{stranger.Server}})
	if !errors.As(ours, &unknown) {
		t.Errorf("a stranger: %v", ours)
	}
	a.RevokeServer(t, dir)
	if ours, _ := meet(t, dir, asking); ours == nil || !strings.Contains(ours.Error(), "was revoked") {
		t.Errorf("a server whose certificate was revoked: %v", ours)
	}
	for _, name := range []string{crlFile, clientCertFile, clientKeyFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, theirs := meet(t, dir, asking); theirs == nil {
		t.Error("without a certificate the client is let in")
	}
	if ours, theirs := meet(t, dir, &tls.Config{Certificates: asking.Certificates}); ours != nil || theirs != nil {
		t.Errorf("without a certificate, where none is asked for: %v, and %v", ours, theirs)
	}
}

// TestClientRefused holds which folders are none for a client.
func TestClientRefused(t *testing.T) {
	remove := func(name string) func(string) error {
		return func(dir string) error { return os.Remove(filepath.Join(dir, name)) }
	}
	for _, tt := range []struct {
		name   string
		damage func(dir string) error
		says   string
	}{
		{"no folder", os.RemoveAll, "no such file"},
		{"a key for all", func(dir string) error { return os.Chmod(filepath.Join(dir, clientKeyFile), 0o644) },
			"a key is nothing for others"},
		{"a certificate without its key", remove(clientKeyFile),
			"client-key.pem: no such file"},
		{"a key without its certificate", remove(clientCertFile),
			"client-cert.pem: no such file"},
		{"a key of another certificate", func(dir string) error {
			return os.Rename(filepath.Join(dir, serverKeyFile), filepath.Join(dir, clientKeyFile))
		}, "private key does not match"},
		{"an empty authority", func(dir string) error { return os.Truncate(filepath.Join(dir, caFile), 0) },
			"no certificate in it"},
		{"an empty list", func(dir string) error { return os.WriteFile(filepath.Join(dir, crlFile), nil, 0o600) },
			"no list of revoked certificates in it"},
	} {
		dir := t.TempDir()
		certs.New(t).Write(t, dir)
		if err := tt.damage(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Client(dir); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.says)
		}
	}
}
