package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
)

// The files of a folder of certificates, as qemu and libnbd have them.
const (
	caFile   = "ca-cert.pem"     // who signs the certificate of the server
	certFile = "client-cert.pem" // of the client; may be missing, along with its key
	keyFile  = "client-key.pem"
)

// readCertificates has TLS use the certificates of a folder.
func readCertificates(config *tls.Config, dir string) error {
	ca, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return fmt.Errorf("nbd: certificates: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(ca) {
		return fmt.Errorf("nbd: certificates: %s: no certificate in it", filepath.Join(dir, caFile))
	}
	if !exists(filepath.Join(dir, certFile)) && !exists(filepath.Join(dir, keyFile)) {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	if err != nil {
		return fmt.Errorf("nbd: certificates: %w", err)
	}
	config.Certificates = []tls.Certificate{pair}
	return nil
}
