// Goserver serves backends that the command has not, with this repository's server or with a
// goroutine for each request.
//
//	goserver [-goroutines | -ledger on | -ledger off] unix:PATH KIND SIZE
//
// KIND is memory, plain, sleep or nanosleep. For each line on its standard input it prints how many
// objects it has allocated so far.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server"
)

func main() {
	goroutines := flag.Bool("goroutines", false, "a goroutine for each request, the usual way in Go")
	ledger := flag.String("ledger", "",
		"`on`: connections keep account of what they have begun, as devices' do; off: served alike, they do not")
	flag.Parse()
	if flag.NArg() != 3 {
		log.Fatal("usage: goserver [-goroutines | -ledger on | -ledger off] ADDRESS KIND SIZE")
	}
	size, err := strconv.ParseInt(flag.Arg(2), 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	b, err := open(flag.Arg(1), size)
	if err != nil {
		log.Fatal(err)
	}
	go reportAllocations()
	network, address, _ := strings.Cut(flag.Arg(0), ":")
	l, err := net.Listen(network, address)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(serve(l, b, *goroutines, *ledger))
}

func open(kind string, size int64) (backends.Backend, error) {
	switch kind {
	case "memory":
		return memory.New(size, memory.Options{})
	case "plain":
		return newPlain(size)
	case "sleep":
		p, err := newPlain(size)
		return slow{p, sleep}, err
	case "nanosleep":
		p, err := newPlain(size)
		return slow{p, nanosleep}, err
	}
	return nil, fmt.Errorf("unknown kind %q", kind)
}

// serve blocks until l fails.
func serve(l net.Listener, b backends.Backend, goroutines bool, ledger string) error {
	e, err := server.NewExport(b, server.Options{})
	if err != nil {
		return err
	}
	s := &server.Server{Exports: map[string]*server.Export{"": e}}
	one := func(session *server.Session) error { return transmitInLedger(session, ledger == "on") }
	switch {
	case goroutines:
		one = func(session *server.Session) error { return transmit(session.NetConn(), b.(readerWriterAt)) }
	case ledger == "":
		return s.Serve(l)
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer nc.Close()
			session, err := s.Handshake(nc)
			if err == nil {
				err = one(session)
			}
			if err != nil {
				log.Print(err)
			}
		}()
	}
}

func reportAllocations() {
	var m runtime.MemStats
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		runtime.ReadMemStats(&m)
		fmt.Println(m.Mallocs)
	}
}
