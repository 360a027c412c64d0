// Package certs reads the certificates that a server has for TLS, from a folder that is laid out as
// for qemu and nbdkit.
package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
)

// The files of a folder.
const (
	caFile   = "ca-cert.pem"     // who signs the certificates of clients
	crlFile  = "ca-crl.pem"      // those that it has revoked; may be missing
	certFile = "server-cert.pem" // of the server, with what is between it and the authority
	keyFile  = "server-key.pem"
)

// A Folder has the certificates of a server. Safe for concurrent use.
type Folder struct {
	dir        string
	verifyPeer bool
	current    atomic.Pointer[tls.Config]
}

// Open reads the folder. With verifyPeer a client needs a certificate that the authority of the
// folder has signed and not revoked.
func Open(dir string, verifyPeer bool) (*Folder, error) {
	f := &Folder{dir: dir, verifyPeer: verifyPeer}
	return f, f.Reload()
}

// Config returns what a server is to be configured with. Clients that come after a Reload meet what
// that has read.
func (f *Folder) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return f.current.Load(), nil },
	}
}

// Reload reads the folder again. With an error, what was read before stays.
func (f *Folder) Reload() error {
	config, err := f.read()
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	f.current.Store(config)
	return nil
}

func (f *Folder) read() (*tls.Config, error) {
	cert, err := os.ReadFile(f.path(certFile))
	if err != nil {
		return nil, err
	}
	key, err := f.readKey()
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", f.path(certFile), keyFile, err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12,
		// A reply is often larger than a packet from the first one on.
		DynamicRecordSizingDisabled: true,
	}
	if !f.verifyPeer {
		return config, nil
	}
	ca, err := os.ReadFile(f.path(caFile))
	if err != nil {
		return nil, err
	}
	authorities, err := parseCertificates(ca)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.path(caFile), err)
	}
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	for _, a := range authorities {
		config.ClientCAs.AddCert(a)
	}
	revoked, err := f.readRevoked(authorities)
	if err != nil {
		return nil, err
	}
	// Unlike VerifyPeerCertificate this is asked about resumed sessions, too.
	config.VerifyConnection = func(s tls.ConnectionState) error { return check(s, revoked) }
	return config, nil
}

// readKey refuses a key that is not the server's alone.
func (f *Folder) readKey() ([]byte, error) {
	path := f.path(keyFile)
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if mode := st.Mode().Perm(); mode&0o007 != 0 {
		return nil, fmt.Errorf("%s: its mode is %#o, and a key is nothing for others; chmod o= %s", path, mode, path)
	}
	return os.ReadFile(path)
}

// parseCertificates reads those of a PEM file.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return all, nil
}

// readRevoked reads what the authorities have revoked. A list that is of none of them, or out of
// date, says nothing of who is to be let in: that is an error, and nobody is.
func (f *Folder) readRevoked(authorities []*x509.Certificate) ([]*x509.RevocationList, error) {
	path := f.path(crlFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var lists []*x509.RevocationList
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if !slices.ContainsFunc(authorities, func(a *x509.Certificate) bool { return signed(list, a) }) {
			return nil, fmt.Errorf("%s: the list is signed by none of %s", path, caFile)
		}
		if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
			return nil, fmt.Errorf("%s: a newer list was due at %v", path, list.NextUpdate)
		}
		lists = append(lists, list)
	}
	if len(lists) == 0 {
		return nil, fmt.Errorf("%s: no list of revoked certificates in it", path)
	}
	return lists, nil
}

// check refuses a client each of whose chains has a certificate that was revoked.
func check(s tls.ConnectionState, revoked []*x509.RevocationList) error {
	var err error
	for _, chain := range s.VerifiedChains {
		if err = checkChain(chain, revoked); err == nil {
			return nil
		}
	}
	return err
}

// signed reports whether a list is of an authority. Whether its certificate says that it may sign
// lists is not asked: many that do have none that says so.
func signed(list *x509.RevocationList, a *x509.Certificate) bool {
	return bytes.Equal(list.RawIssuer, a.RawSubject) &&
		a.CheckSignature(list.SignatureAlgorithm, list.RawTBSRevocationList, list.Signature) == nil
}

func checkChain(chain []*x509.Certificate, revoked []*x509.RevocationList) error {
	for i, issuer := range chain[1:] {
		c := chain[i]
		for _, list := range revoked {
			if !signed(list, issuer) {
				continue
			}
			for _, r := range list.RevokedCertificateEntries {
				if r.SerialNumber.Cmp(c.SerialNumber) == 0 {
					return fmt.Errorf("the certificate of %s was revoked", c.Subject)
				}
			}
		}
	}
	return nil
}

func (f *Folder) path(name string) string { return filepath.Join(f.dir, name) }
