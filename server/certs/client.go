package certs

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Client returns how a client is to be configured that has the certificates of a folder: servers
// are those that its authority has signed and not revoked, and the client has a certificate of its
// own if there is one. The caller adds the ServerName. What is in the folder later does not matter.
func Client(dir string) (*tls.Config, error) {
	a, err := readAuthority(dir)
	if err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	config := &tls.Config{RootCAs: a.pool, VerifyConnection: a.check, MinVersion: tls.VersionTLS12}
	pair, err := readPair(dir, clientCertFile, clientKeyFile)
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{pair}
	case !missing(dir, clientCertFile) || !missing(dir, clientKeyFile):
		return nil, fmt.Errorf("certificates: %w", err)
	}
	return config, nil
}

// missing reports whether a file is not there.
func missing(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return errors.Is(err, fs.ErrNotExist)
}
