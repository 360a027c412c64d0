package nbd_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// stranger is the configuration of a client that trusts nobody who is in these tests.
var stranger = &tls.Config{ServerName: "localhost", RootCAs: x509.NewCertPool()}

// startTLS is the turn in which TLS begins.
var startTLS = turn{option(optStartTLS), answer(optStartTLS, repAck)}

// secretly speaks some turns in plain text, and the others over TLS. It returns what is wrong with
// the client's part, or with TLS.
func secretly(nc net.Conn, plain []turn, config *tls.Config, secret []turn) error {
	defer nc.Close()
	if err := speak(nc, plain); err != nil {
		return err
	}
	secure := tls.Server(nc, config)
	if err := secure.Handshake(); err != nil {
		io.Copy(io.Discard, nc) // The client is to read the alert, and to hang up.
		return err
	}
	return play(secure, secret)
}

// A tlsCase is a client that connects to a server with TLS.
type tlsCase struct {
	name   string
	uri    nbd.URI
	tls    *tls.Config // of Options
	server *tls.Config
	check  func(t *testing.T, err error) // nil: it succeeds
}

// run connects over a socket. A pipe would not do, as both sides of TLS speak at once.
func (tt tlsCase) run(t *testing.T) {
	client, server := socketpair(t)
	served := make(chan error, 1)
	go func() {
		served <- secretly(server, greeted(startTLS), tt.server, []turn{hasExtended, hasAllocation, hasGo, isLeftLong})
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	tt.uri.Export = "disk"
	c, err := tt.uri.Dial(ctx, nbd.Options{TLS: tt.tls,
		Dial: func(context.Context) (net.Conn, error) { return client, nil }})
	if tt.check == nil {
		if err != nil {
			t.Fatal(err)
		}
		if !c.Agreement().TLS || !c.Agreement().Extended {
			t.Errorf("agreed on %+v", c.Agreement())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		return
	}
	if err == nil {
		c.Close()
	}
	tt.check(t, err)
	if err := <-served; err == nil {
		t.Error("the server is content")
	}
	if _, err := client.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is open: %v", err)
	}
}

// as returns a check that an error is, by errors.As, one of a type.
func as[E error](t *testing.T, err error) {
	t.Helper()
	if e := new(E); !errors.As(err, e) {
		t.Errorf("error %v, want one of type %T", err, *e)
	}
}

// says returns a check that an error has a text.
func says(text string) func(t *testing.T, err error) {
	return func(t *testing.T, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("error %v, want %q", err, text)
		}
	}
}

// TestTLS holds whom a client believes to be the server, and who it says it is itself.
func TestTLS(t *testing.T) {
	authority, other := certs.New(t), certs.New(t)
	dir, others, anonymous := t.TempDir(), t.TempDir(), t.TempDir()
	authority.Write(t, dir)
	other.Write(t, others)
	authority.Write(t, anonymous)
	for _, name := range []string{"client-cert.pem", "client-key.pem"} {
		if err := os.Remove(filepath.Join(anonymous, name)); err != nil {
			t.Fatal(err)
		}
	}
	server := func(change func(*tls.Config)) *tls.Config {
		c := &tls.Config{Certificates: []tls.Certificate{authority.Server}}
		change(c)
		return c
	}
	plain := server(func(*tls.Config) {})
	strict := server(func(c *tls.Config) { c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, authority.Pool })
	tcp := func(host, dir string) nbd.URI {
		return nbd.URI{Network: "tcp", Address: net.JoinHostPort(host, "10809"), TLS: true, Certificates: dir}
	}
	unknown, misnamed := as[x509.UnknownAuthorityError], as[x509.HostnameError]
	trusting := &tls.Config{RootCAs: authority.Pool}
	for _, tt := range []tlsCase{
		{"by name", tcp("localhost", dir), nil, plain, nil},
		{"by address", tcp("127.0.0.1", dir), nil, plain, nil},
		{"by an address of IPv6", tcp("::1", dir), nil, plain, nil},
		{"by an address with a zone", tcp("::1%lo", dir), nil, plain, nil},
		{"Unix", nbd.URI{Network: "unix", Address: "/s", TLS: true, Certificates: dir}, nil, plain, nil},
		{"vsock", nbd.URI{Network: "vsock", Address: "2:10809", TLS: true, Certificates: dir}, nil, plain, nil},
		{"another host", tcp("example.com", dir), nil, plain, misnamed},
		{"another address", tcp("127.0.0.2", dir), nil, plain, misnamed},
		{"another host of the right name", nbd.URI{Network: "tcp", Address: "example.com:1", TLS: true,
			Certificates: dir, Hostname: "localhost"}, nil, plain, nil},
		{"the right host of another name", nbd.URI{Network: "tcp", Address: "localhost:1", TLS: true, Certificates: dir,
			Hostname: "example.com"}, nil, plain, misnamed},
		{"a stranger", tcp("localhost", others), nil, plain, unknown},
		{"authorities of the system", tcp("localhost", ""), nil, plain, unknown},
		{"a stranger, unverified", nbd.URI{Network: "tcp", Address: "example.com:1", TLS: true, Certificates: others,
			Unverified: true}, nil, plain, nil},
		{"unverified", nbd.URI{Network: "unix", Address: "/s", TLS: true, Unverified: true}, nil, plain, nil},
		{"TLS of options", nbd.URI{Network: "tcp", Address: "localhost:1"}, trusting, plain, nil},
		{"TLS of options for another host", nbd.URI{Network: "tcp", Address: "example.com:1"}, trusting, plain,
			misnamed},
		{"TLS of options with a name", nbd.URI{Network: "tcp", Address: "example.com:1"},
			&tls.Config{RootCAs: authority.Pool, ServerName: "localhost"}, plain, nil},
		{"with a certificate", tcp("localhost", dir), nil, strict, nil},
		{"without a certificate", tcp("localhost", anonymous), nil, strict, says("certificate required")},
		{"without a certificate that nobody wants", tcp("localhost", anonymous), nil, plain, nil},
		{"with a certificate of a stranger", nbd.URI{Network: "tcp", Address: "localhost:1", TLS: true,
			Certificates: others, Unverified: true}, nil, strict, says("remote error: tls")},
		{"an old server", tcp("localhost", dir), nil,
			server(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }),
			says("protocol version")},
		{"an older server", tcp("localhost", dir), nil,
			server(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), nil},
	} {
		t.Run(tt.name, tt.run)
	}
	if trusting.ServerName != "" {
		t.Error("the caller's configuration was changed")
	}
}

// TestCertificates holds that no connection is made with a folder that is not as it has to be.
func TestCertificates(t *testing.T) {
	authority, other := certs.New(t), certs.New(t)
	for name, tt := range map[string]struct {
		spoil func(dir string) error
		is    error  // nil: any
		says  string // the file
	}{
		"no folder": {os.RemoveAll, os.ErrNotExist, "ca-cert.pem"},
		"no authority": {func(dir string) error { return os.Remove(filepath.Join(dir, "ca-cert.pem")) },
			os.ErrNotExist, "ca-cert.pem"},
		"an empty file": {func(dir string) error { return os.Truncate(filepath.Join(dir, "ca-cert.pem"), 0) },
			nil, "ca-cert.pem"},
		"no key": {func(dir string) error { return os.Remove(filepath.Join(dir, "client-key.pem")) },
			os.ErrNotExist, "client-key.pem"},
		"no certificate": {func(dir string) error { return os.Remove(filepath.Join(dir, "client-cert.pem")) },
			os.ErrNotExist, "client-cert.pem"},
		"half a key": {func(dir string) error { return os.Truncate(filepath.Join(dir, "client-key.pem"), 40) },
			nil, "key input"},
		"the wrong key": {func(dir string) error { return move(other, t, dir, "client-key.pem") }, nil, "private key"},
		"another's pair": {func(dir string) error { return move(other, t, dir, "client-cert.pem") },
			nil, "private key"},
		"a file, no folder": {func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
		}, nil, "ca-cert.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "certificates")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			authority.Write(t, dir)
			if err := tt.spoil(dir); err != nil {
				t.Fatal(err)
			}
			u := nbd.URI{Network: "tcp", Address: "localhost:1", TLS: true, Certificates: dir}
			o := nbd.Options{Dial: func(context.Context) (net.Conn, error) {
				t.Error("a connection is made")
				return nil, net.ErrClosed
			}}
			_, dialed := u.Dial(context.Background(), o)
			_, negotiated := u.Negotiate(context.Background(), o)
			for _, err := range []error{dialed, negotiated} {
				if err == nil || !strings.Contains(err.Error(), tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("error %v, want %q", err, tt.says)
				}
			}
		})
	}
}

// move has a folder have a file of another authority.
func move(from *certs.Authority, t *testing.T, dir, name string) error {
	of := t.TempDir()
	from.Write(t, of)
	return os.Rename(filepath.Join(of, name), filepath.Join(dir, name))
}
