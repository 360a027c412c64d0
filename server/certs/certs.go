// Package certs reads the certificates of servers and clients from folders that are laid out as for
// qemu, nbdkit and libnbd.
package certs

import (
	"crypto/tls"
	"fmt"
	"sync/atomic"
)

// The files of a folder.
const (
	caFile  = "ca-cert.pem" // who signs the certificates of the other side
	crlFile = "ca-crl.pem"  // those that it has revoked; may be missing

	serverCertFile = "server-cert.pem" // of the server, with what is between it and the authority
	serverKeyFile  = "server-key.pem"
	clientCertFile = "client-cert.pem" // of the client; may be missing, along with its key
	clientKeyFile  = "client-key.pem"
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
	pair, err := readPair(f.dir, serverCertFile, serverKeyFile)
	if err != nil {
		return nil, err
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
	a, err := readAuthority(f.dir)
	if err != nil {
		return nil, err
	}
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, a.pool
	// Unlike VerifyPeerCertificate this is asked about resumed sessions, too.
	config.VerifyConnection = a.check
	return config, nil
}
