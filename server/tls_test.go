package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

const startTLS = "\x49\x48\x41\x56\x45\x4f\x50\x54\x00\x00\x00\x05\x00\x00\x00\x00"

// secureServer is a server that has TLS.
func secureServer(t testing.TB, a *certs.Authority) *server.Server {
	return &server.Server{Exports: exports(t), TLS: &tls.Config{Certificates: []tls.Certificate{a.Server}}}
}

// trusting is how a client is configured that trusts a.
func trusting(a *certs.Authority) *tls.Config {
	return &tls.Config{RootCAs: a.Pool, ServerName: "localhost"}
}

// converse says something, and returns as much of the answer as is expected, or less.
func converse(t *testing.T, nc net.Conn, said, want string) string {
	t.Helper()
	go io.WriteString(nc, said)
	b := make([]byte, len(want))
	n, _ := io.ReadFull(nc, b)
	return string(b[:n])
}

// secured greets, says something, and begins TLS.
func secured(t *testing.T, nc net.Conn, config *tls.Config, said, answer string) *tls.Conn {
	t.Helper()
	want := greeting + answer + optionReply(optStartTLS, repAck, "")
	if got := converse(t, nc, clientFlags(3)+said+startTLS, want); got != want {
		t.Fatalf("before TLS the answer is %q, want %q", got, want)
	}
	return tls.Client(nc, config)
}

// TestTLSServed holds what a client over TLS is served, up to the largest request, and how it ends.
func TestTLSServed(t *testing.T) {
	a := certs.New(t)
	disk := newDisk(64 << 20)
	s := secureServer(t, a)
	s.Exports["big"] = export(t, disk, server.Options{})
	d := serve(t, s)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := trusting(a)
		config.MinVersion, config.MaxVersion = version, version
		nc := secured(t, d.dial(t, "-"), config, "", "")
		const size = "\x00\x00\x00\x00\x04\x00\x00\x00"
		if got := converse(t, nc, option(optExportName, "big"), "0123456789"); got[:8] != size {
			t.Fatalf("the answer is %q", got)
		}
		c := newClient(t, nc)
		for i, n := range []int{512, 4096, 100_000, 32 << 20} {
			p := bytes.Repeat([]byte{byte(version), byte(i), 3}, n/3+1)[:n]
			c.expect(0, call{op: cmdWrite, offset: 12345, data: p})
			if got := c.expect(0, call{op: cmdRead, offset: 12345, length: uint32(n)}); !bytes.Equal(got, p) {
				t.Errorf("%s: %d bytes come back changed", tls.VersionName(version), n)
			}
		}
		c.start(call{op: cmdDisc})
		if n, err := nc.Read(make([]byte, 1)); n != 0 || err != io.EOF { // and not io.ErrUnexpectedEOF
			t.Errorf("after the goodbye: %d, %v", n, err)
		}
	}
}

// TestTLSRefused holds whom a server lets in that knows its clients, and over what versions.
func TestTLSRefused(t *testing.T) {
	a, stranger := certs.New(t), certs.New(t)
	var log logBuffer
	s := secureServer(t, a)
	s.Logger = slog.New(log.handler())
	s.TLS.ClientAuth, s.TLS.ClientCAs = tls.RequireAndVerifyClientCert, a.Pool
	s.TLS.MinVersion = tls.VersionTLS10
	d := serve(t, s)
	with := func(change func(*tls.Config)) *tls.Config {
		config := trusting(a)
		config.Certificates = []tls.Certificate{a.Client}
		change(config)
		return config
	}
	for _, tt := range []struct {
		name   string
		config *tls.Config
		served bool
	}{
		{"one of ours", with(func(*tls.Config) {}), true},
		{"without a certificate", with(func(c *tls.Config) { c.Certificates = nil }), false},
		{"a stranger", with(func(c *tls.Config) {
			c.Certificates = nil
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &stranger.Client, nil
			}
		}), false},
		{"with a server's certificate", with(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{a.Server}
		}), false},
		{"TLS 1.1", with(func(c *tls.Config) {
			c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
		}), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nc := secured(t, d.dial(t, "-"), tt.config, "", "")
			want := optionReply(optAbort, repAck, "")
			if got := converse(t, nc, option(optAbort, ""), want); (got == want) != tt.served {
				t.Errorf("the answer is %q", got)
			}
		})
	}
	// A client learns nothing of a server that it does not trust.
	nc := secured(t, d.dial(t, "-"), trusting(stranger), "", "")
	var unknown *tls.CertificateVerificationError
	if err := nc.Handshake(); !errors.As(err, &unknown) {
		t.Errorf("the handshake with a strange server: %v", err)
	}
}

// TestTLSTurns holds that clients which stop in the middle of a TLS handshake keep nobody from
// theirs, though but one is computed at a time, and that HandshakeTimeout ends them.
func TestTLSTurns(t *testing.T) {
	a := certs.New(t)
	synctest.Test(t, func(t *testing.T) {
		s := secureServer(t, a)
		s.MaxTLSHandshakes, s.HandshakeTimeout = 1, time.Minute
		d := serve(t, s)
		var stopped []net.Conn
		for _, said := range []string{"", "\x16\x03\x01\x02\x00\x01", "\x16"} {
			nc := d.dial(t, "-")
			want := greeting + optionReply(optStartTLS, repAck, "")
			if got := converse(t, nc, clientFlags(3)+startTLS+said, want); got != want {
				t.Fatalf("the answer is %q", got)
			}
			stopped = append(stopped, nc)
		}
		deaf := d.dial(t, "-") // It does not take the server's part of the handshake.
		secured(t, deaf, trusting(a), "", "")
		hello := secured(t, d.dial(t, "-"), trusting(a), "", "")
		never := make(chan struct{})
		go tls.Client(writeOnly{deaf, never}, trusting(a)).Handshake()
		begun := time.Now()
		if err := hello.Handshake(); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > 0 {
			t.Errorf("it had to wait for %v", took)
		}
		for _, nc := range append(stopped, deaf) {
			io.Copy(io.Discard, nc)
		}
		if took := time.Since(begun); took != time.Minute {
			t.Errorf("the others went after %v", took)
		}
		hello.Close()
		close(never)
	})
}

// writeOnly is a connection from which nothing is read before it ends.
type writeOnly struct {
	net.Conn
	end chan struct{}
}

func (c writeOnly) Read([]byte) (int, error) {
	<-c.end
	return 0, io.EOF
}

// TestTLSShutdown holds that a request in flight is answered over TLS, and then the end told; and
// that to cut a client which takes nothing waits for nothing.
func TestTLSShutdown(t *testing.T) {
	a := certs.New(t)
	release, entered := make(chan struct{}), make(chan struct{})
	disk := newDisk(8192)
	disk.before = func(string, int64, int64) error { close(entered); <-release; return nil }
	s := secureServer(t, a)
	s.Exports = map[string]*server.Export{"": export(t, disk, server.Options{})}
	d := serve(t, s)
	nc := secured(t, d.dial(t, "-"), trusting(a), "", "")
	converse(t, nc, option(optExportName, ""), "0123456789")
	busy := newClient(t, nc)
	answered := busy.start(call{op: cmdRead, length: 512})
	<-entered
	done := make(chan error)
	go func() { done <- s.Shutdown(context.Background()) }()
	close(release)
	if r := <-answered; r.errno != 0 || len(r.data) != 512 {
		t.Errorf("the request in flight: %+v", r)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}

	s = secureServer(t, a)
	d = serve(t, s)
	nc = secured(t, d.dial(t, "-"), trusting(a), "", "")
	converse(t, nc, option(optExportName, ""), "0123456789")
	nc.Write(call{op: cmdRead, length: 1 << 20}.encode(1)) // of which nothing is taken
	begun := time.Now()
	s.Close()
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("Close took %v", took)
	}
}

// TestTLSSession holds what is known of a session over TLS, and where it cannot go on.
func TestTLSSession(t *testing.T) {
	a := certs.New(t)
	s := secureServer(t, a)
	s.TLS.ClientAuth, s.TLS.ClientCAs = tls.RequireAndVerifyClientCert, a.Pool
	ours, theirs := net.Pipe()
	defer ours.Close()
	config := trusting(a)
	config.Certificates = []tls.Certificate{a.Client}
	go func() {
		nc := secured(t, ours, config, "", "")
		io.WriteString(nc, option(optGo, infoData("disk")))
		io.Copy(io.Discard, nc)
	}()
	session, err := s.Handshake(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Conn().Close()
	over, ok := session.NetConn().(*tls.Conn)
	if !ok || !session.Agreement.TLS {
		t.Fatalf("%T, %+v", session.NetConn(), session.Agreement)
	}
	if got := over.ConnectionState().PeerCertificates[0].Subject.CommonName; got != "nbdctl test client" {
		t.Errorf("the client is %q", got)
	}
	if _, err := s.Resume(theirs, session.Agreement, nil); err == nil {
		t.Error("what was agreed over TLS goes on in plain text")
	}
	plain := session.Agreement
	plain.TLS, s.RequireTLS = false, true
	if _, err := s.Resume(theirs, plain, nil); err == nil {
		t.Error("a session in plain text goes on where TLS is required")
	}
	if err := (&server.Server{RequireTLS: true}).Serve(newDialer()); err == nil || err == server.ErrServerClosed {
		t.Errorf("a server that requires what it has not: %v", err)
	}
}

// overTLS is a pair of sockets that talk over TLS.
func overTLS(t testing.TB, a *certs.Authority) (ours, theirs net.Conn) {
	client, served := socketpair(t)
	over := tls.Server(served, &tls.Config{Certificates: []tls.Certificate{a.Server}})
	ours = tls.Client(client, trusting(a))
	done := make(chan error, 1)
	go func() { done <- over.Handshake() }()
	if err := errors.Join(ours.(*tls.Conn).Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return ours, over
}
