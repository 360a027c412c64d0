// Gonbd serves memory or a file with github.com/pojntfx/go-nbd, a peer.
//
//	gonbd unix:PATH|tcp:HOST:PORT memory SIZE
//	gonbd unix:PATH|tcp:HOST:PORT file PATH
package main

import (
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: gonbd ADDRESS memory SIZE | file PATH")
	}
	b, err := open(os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	network, address, _ := strings.Cut(os.Args[1], ":")
	l, err := net.Listen(network, address)
	if err != nil {
		log.Fatal(err)
	}
	exports := []*server.Export{{Name: "", Backend: b}}
	for {
		nc, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer nc.Close()
			if err := server.Handle(nc, exports, &server.Options{SupportsMultiConn: true}); err != nil {
				log.Print(err)
			}
		}()
	}
}

func open(kind, arg string) (backend.Backend, error) {
	switch kind {
	case "memory":
		size, err := strconv.ParseInt(arg, 10, 64)
		if err != nil {
			return nil, err
		}
		return backend.NewMemoryBackend(make([]byte, size)), nil
	case "file":
		f, err := os.OpenFile(arg, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		return backend.NewFileBackend(f), nil
	}
	return nil, fmt.Errorf("unknown kind %q", kind)
}
