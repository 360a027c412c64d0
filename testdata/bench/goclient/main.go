// Goclient loads an NBD server through package backends/nbd, as loadgen does without it.
//
//	goclient verify [flags] URI      read what loadgen fill has written, and compare all of it
//	goclient load [flags] URI        the timed load; what it wrote last is read back afterwards
//	goclient copy [flags] URI [URI]  read a whole export, and write it to another if one is given
//
// Requests in flight are goroutines that call ReadAt or WriteAt. The result of a load is a line of
// JSON on stdout. Whatever goes wrong, a wrong byte included, is a line on stderr and exit code 1.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// Options are the flags. They have the letters of loadgen.
type options struct {
	connections int
	depth       int
	block       int
	reads       int
	sequential  bool
	space       int64
	warm, timed float64 // in seconds
	pid, cpu    int
	profile     string
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("goclient: ")
	if len(os.Args) < 2 {
		log.Fatal("usage: goclient verify|load|copy [flags] URI [URI]")
	}
	var o options
	f := flag.NewFlagSet("goclient", flag.ExitOnError)
	f.IntVar(&o.connections, "c", 1, "connections")
	f.IntVar(&o.depth, "q", 1, "requests in flight on each")
	f.IntVar(&o.block, "b", 4096, "`bytes` of a request")
	f.IntVar(&o.reads, "r", 100, "100 to read, 0 to write")
	f.BoolVar(&o.sequential, "s", false, "sequential")
	f.Int64Var(&o.space, "S", 512<<20, "`bytes` of the export that are used")
	f.Float64Var(&o.warm, "w", 0.1, "`seconds` to warm up")
	f.Float64Var(&o.timed, "d", 0.5, "`seconds` that count")
	f.IntVar(&o.pid, "p", 0, "process id of the server, whose CPU time is taken")
	f.IntVar(&o.cpu, "P", -1, "`processor` of which is told what others use; -1: all")
	f.StringVar(&o.profile, "cpuprofile", "", "write a profile of the CPU time that counts to `file`")
	_ = f.Parse(os.Args[2:]) // It exits by itself.
	if err := perform(os.Args[1], o, f.Args()); err != nil {
		log.Fatal(err)
	}
}

func perform(mode string, o options, uris []string) error {
	var clients []*nbd.Client
	for _, uri := range uris {
		c, err := nbd.Dial(context.Background(), uri, nbd.Options{Connections: o.connections})
		if err != nil {
			return err
		}
		defer c.Close()
		clients = append(clients, c)
	}
	switch {
	case mode == "copy" && len(clients) == 1:
		return copyAll(clients[0], nil, o)
	case mode == "copy" && len(clients) == 2:
		return copyAll(clients[0], clients[1], o)
	case mode == "verify" && len(clients) == 1:
		return verify(clients[0], o)
	case mode == "load" && len(clients) == 1:
		s, err := load(clients[0], o)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(s)
	}
	return fmt.Errorf("%s does not go with %d URIs", mode, len(clients))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
