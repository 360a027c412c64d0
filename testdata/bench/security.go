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

// makeCertificates makes a folder as qemu and nbdkit have it: a certificate that signs itself is
// also the authority.
func makeCertificates(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "nbdctl benchmarks"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		DNSNames:              []string{"localhost"},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		writePEM(dir, "ca-cert.pem", "CERTIFICATE", cert),
		writePEM(dir, "server-cert.pem", "CERTIFICATE", cert),
		writePEM(dir, "server-key.pem", "PRIVATE KEY", private),
	)
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

// nbdServerOverTLS is nbd-server with a configuration that requires TLS.
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
