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
	"time"
)

// An authority says whose certificates are good.
type authority struct {
	pool    *x509.CertPool
	revoked []*x509.RevocationList
}

// readAuthority reads that of a folder.
func readAuthority(dir string) (*authority, error) {
	path := filepath.Join(dir, caFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	all, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	a := &authority{pool: x509.NewCertPool()}
	for _, c := range all {
		a.pool.AddCert(c)
	}
	a.revoked, err = readRevoked(filepath.Join(dir, crlFile), all)
	return a, err
}

// readPair reads a certificate and its key.
func readPair(dir, certFile, keyFile string) (tls.Certificate, error) {
	path := filepath.Join(dir, certFile)
	cert, err := os.ReadFile(path)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readKey(filepath.Join(dir, keyFile))
	if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s and %s: %w", path, keyFile, err)
	}
	return pair, nil
}

// readKey refuses a key that others can read.
func readKey(path string) ([]byte, error) {
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
func readRevoked(path string, authorities []*x509.Certificate) ([]*x509.RevocationList, error) {
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

// check refuses a peer each of whose chains has a certificate that was revoked.
func (a *authority) check(s tls.ConnectionState) error {
	var err error
	for _, chain := range s.VerifiedChains {
		if err = checkChain(chain, a.revoked); err == nil {
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
