package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// folder stands for the folder of certificates in what overTLS adds to a command.
const folder = "{certificates}"

// makeCertificates makes a folder as qemu, nbdkit and libnbd have it, for servers and for loadgen.
func makeCertificates(dir string) error {
	authority, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := certificate("authority of the benchmarks")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	signed, err := x509.CreateCertificate(rand.Reader, ca, ca, authority.Public(), authority)
	if err != nil {
		return err
	}
	server := certificate("localhost")
	server.DNSNames, server.ExtKeyUsage = []string{"localhost"}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	client := certificate("loadgen")
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		writePEM(dir, "ca-cert.pem", "CERTIFICATE", signed),
		writeSigned(dir, "server", server, ca, authority),
		writeSigned(dir, "client", client, ca, authority),
	)
}

// writeSigned writes a certificate that the authority has signed, and its key.
func writeSigned(dir, name string, c, ca *x509.Certificate, authority *ecdsa.PrivateKey) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), authority)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		writePEM(dir, name+"-cert.pem", "CERTIFICATE", cert),
		writePEM(dir, name+"-key.pem", "PRIVATE KEY", private),
	)
}

func certificate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func writePEM(dir, name, kind string, der []byte) error {
	return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// overTLS is a server with flags that have it speak nothing but TLS. They come before what it
// serves.
func overTLS(s server, flags ...string) server {
	plain := s.command
	s.command = func(w *workspace, at place) ([]string, error) {
		argv, err := plain(w, at)
		if err != nil {
			return nil, err
		}
		var own []string
		for _, f := range flags {
			own = append(own, strings.ReplaceAll(f, folder, w.path("certificates")))
		}
		behind := 1
		if slices.Contains(argv, "serve") {
			behind = 2
		}
		return slices.Insert(argv, behind, own...), nil
	}
	s.tls = true
	return s
}

// nbdServerOverTLS is nbd-server with a configuration that requires TLS. It asks every client for a
// certificate and refuses those that have none, whatever its manual says of a missing cacertfile:
// in nbd-server.c of 3.24, handle_starttls always sets verify_cert.
func nbdServerOverTLS() server {
	s := nbdServer()
	plain := s.command
	s.command = func(w *workspace, at place) ([]string, error) {
		argv, err := plain(w, at)
		if err != nil {
			return nil, err
		}
		config := at.image + ".conf"
		text, err := os.ReadFile(config)
		if err != nil {
			return nil, err
		}
		dir := w.path("certificates")
		generic := fmt.Sprintf("[generic]\ncertfile = %s/server-cert.pem\nkeyfile = %s/server-key.pem\n"+
			"cacertfile = %s/ca-cert.pem\nforce_tls = true\n", dir, dir, dir)
		secured := strings.Replace(string(text), "[generic]\n", generic, 1)
		return argv, os.WriteFile(config, []byte(secured), 0o644)
	}
	s.tls = true
	return s
}
