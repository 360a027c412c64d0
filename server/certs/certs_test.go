package certs

import (
	"crypto/tls"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/testdata/certs"
)

// handshake has a client begin TLS with a server of that folder, and returns how that ends for the
// server. config becomes the client's.
func handshake(t *testing.T, f *Folder, config *tls.Config) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // not net.Pipe, where two that write wait for each other
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	config = config.Clone() // The client of the handshake before may still look at it.
	config.ServerName = "localhost"
	go func() {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return
		}
		client := tls.Client(nc, config)
		client.Handshake()
		io.Copy(io.Discard, client) // Over TLS 1.3 it is the last to know.
		client.Close()
	}()
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	return tls.Server(theirs, f.Config()).Handshake()
}

// TestReload holds that clients meet the certificates that were read last.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	first, second := certs.New(t), certs.New(t)
	first.Write(t, dir)
	f, err := Open(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	trusted := func(a *certs.Authority) bool { return handshake(t, f, &tls.Config{RootCAs: a.Pool}) == nil }
	if !trusted(first) || trusted(second) {
		t.Error("the server has not the certificates of its folder")
	}
	second.Write(t, dir)
	if !trusted(first) {
		t.Error("files that changed count before they are read")
	}
	if err := f.Reload(); err != nil {
		t.Fatal(err)
	}
	if trusted(first) || !trusted(second) {
		t.Error("files that were read do not count")
	}
	if err := os.Remove(filepath.Join(dir, serverKeyFile)); err != nil {
		t.Fatal(err)
	}
	if err := f.Reload(); !errors.Is(err, fs.ErrNotExist) || !trusted(second) {
		t.Errorf("a key that is missing: %v", err)
	}
}

// TestVerifyPeer holds who is let in: a client with a certificate of the authority, unless that has
// revoked it.
func TestVerifyPeer(t *testing.T) {
	dir := t.TempDir()
	ours, stranger := certs.New(t), certs.New(t)
	ours.Write(t, dir)
	f, err := Open(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	as := func(c ...tls.Certificate) *tls.Config {
		config := &tls.Config{RootCAs: ours.Pool}
		if len(c) > 0 {
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &c[0], nil
			}
		}
		return config
	}
	session := as(ours.Client)
	session.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	session.MaxVersion = tls.VersionTLS12 // whose tickets come with the handshake
	for range 2 {
		if err := handshake(t, f, session); err != nil {
			t.Errorf("one of ours: %v", err)
		}
	}
	if handshake(t, f, as()) == nil || handshake(t, f, as(stranger.Client)) == nil {
		t.Error("a stranger is let in")
	}
	stranger.Revoke(t, dir)
	if err := f.Reload(); err == nil || !strings.Contains(err.Error(), "signed by none of ca-cert.pem") {
		t.Errorf("a list of somebody else: %v", err)
	}
	if err := handshake(t, f, as(ours.Client)); err != nil {
		t.Errorf("one of ours: %v", err)
	}
	ours.Revoke(t, dir)
	if err := f.Reload(); err != nil {
		t.Fatal(err)
	}
	for name, config := range map[string]*tls.Config{"anew": as(ours.Client), "resumed": session} {
		if err := handshake(t, f, config); err == nil || !strings.Contains(err.Error(), "was revoked") {
			t.Errorf("%s, with a certificate that was revoked: %v", name, err)
		}
	}
}

// TestRefused holds which folders are none.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(dir string) error
		says   string
	}{
		{"no folder", os.RemoveAll, "no such file"},
		{"a key for all", func(dir string) error { return os.Chmod(filepath.Join(dir, serverKeyFile), 0o644) },
			"its mode is 0644, and a key is nothing for others; chmod o= "},
		{"a key of another certificate", func(dir string) error {
			return os.Rename(filepath.Join(dir, "client-key.pem"), filepath.Join(dir, serverKeyFile))
		}, "private key does not match"},
		{"no authority", func(dir string) error { return os.Remove(filepath.Join(dir, caFile)) },
			"ca-cert.pem: no such"},
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
		if _, err := Open(dir, true); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.says)
		}
	}
	// A group may have the key.
	dir := t.TempDir()
	certs.New(t).Write(t, dir)
	if err := os.Chmod(filepath.Join(dir, serverKeyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, true); err != nil {
		t.Error(err)
	}
}
