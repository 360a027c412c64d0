package certs_test

import (
	"log"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/certs"
)

// A server has the certificates of a folder, and new ones without a restart.
func Example() {
	folder, err := certs.Open("/etc/pki/nbd", false)
	if err != nil {
		log.Fatal(err)
	}
	s := server.Server{TLS: folder.Config(), RequireTLS: true}
	defer s.Close()

	// Later, when the files have changed:
	if err := folder.Reload(); err != nil {
		log.Print(err) // What was read before stays.
	}
}
