// Package certs makes certificates for tests, in the files that qemu and nbdkit look for.
package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An Authority signs the certificates of a server and of a client, which are good until tomorrow.
type Authority struct {
	CA     *x509.Certificate
	Pool   *x509.CertPool // of CA alone
	Server tls.Certificate
	Client tls.Certificate

	key *ecdsa.PrivateKey
}

// New makes an authority, and a certificate for a server at localhost and one for a client.
func New(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{key: newKey(t), Pool: x509.NewCertPool()}
	ca := template("nbdctl test authority")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.CA, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.Pool.AddCert(a.CA)
	server := template("nbdctl test server")
	server.DNSNames = []string{"localhost"}
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	a.Server = a.sign(t, server)
	client := template("nbdctl test client")
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	a.Client = a.sign(t, client)
	return a
}

// Write writes ca-cert.pem, and certificate and key of server and client, to a folder.
func (a *Authority) Write(t testing.TB, dir string) {
	t.Helper()
	write(t, filepath.Join(dir, "ca-cert.pem"), 0o644, "CERTIFICATE", a.CA.Raw)
	for name, c := range map[string]tls.Certificate{"server": a.Server, "client": a.Client} {
		key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name+"-cert.pem"), 0o644, "CERTIFICATE", c.Certificate[0])
		write(t, filepath.Join(dir, name+"-key.pem"), 0o600, "PRIVATE KEY", key)
	}
}

// Revoke writes ca-crl.pem, which has the certificate of the client.
func (a *Authority) Revoke(t testing.TB, dir string) { a.revoke(t, dir, a.Client) }

// RevokeServer writes ca-crl.pem, which has the certificate of the server.
func (a *Authority) RevokeServer(t testing.TB, dir string) { a.revoke(t, dir, a.Server) }

func (a *Authority) revoke(t testing.TB, dir string, which tls.Certificate) {
	t.Helper()
	c, err := x509.ParseCertificate(which.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	// Many authorities have no certificate that says that they may sign lists, and do.
	signer := *a.CA
	signer.KeyUsage |= x509.KeyUsageCRLSign
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number:     big.NewInt(1),
		ThisUpdate: c.NotBefore,
		NextUpdate: c.NotAfter,
		RevokedCertificateEntries: []x509.RevocationListEntry{
			{SerialNumber: c.SerialNumber, RevocationTime: c.NotBefore},
		},
	}, &signer, a.key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "ca-crl.pem"), 0o644, "X509 CRL", der)
}

func (a *Authority) sign(t testing.TB, c *x509.Certificate) tls.Certificate {
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, c, a.CA, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func template(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 64)) // It never fails.
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), // before the time of package synctest
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func write(t testing.TB, path string, mode os.FileMode, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
		t.Fatal(err)
	}
}
