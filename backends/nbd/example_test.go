package nbd_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
)

// offer serves 4 KiB of memory on a socket, and returns its URI.
func offer() (uri string, stop func()) {
	m, err := memory.New(4<<10, memory.Options{})
	if err != nil {
		log.Fatal(err)
	}
	e, err := server.NewExport(m, server.Options{Description: "a small disk"})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{"disk": e}}
	go s.Serve(l)
	return "nbd://" + l.Addr().String() + "/disk", func() { s.Close(); m.Close() }
}

// A program reads and writes an export of a server.
func Example() {
	uri, stop := offer()
	defer stop()

	disk, err := nbd.Dial(context.Background(), uri, nbd.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	if _, err := disk.WriteAt([]byte("hello"), 512); err != nil {
		log.Fatal(err)
	}
	if err := disk.Sync(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("size:", disk.Size())
	if _, err := io.Copy(os.Stdout, io.NewSectionReader(disk, 512, 5)); err != nil {
		log.Fatal(err)
	}
	// Output:
	// size: 4096
	// hello
}

// The map of an export says what there is to be read.
func ExampleClient_Extents() {
	uri, stop := offer()
	defer stop()

	disk, err := nbd.Dial(context.Background(), uri, nbd.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	err = disk.Extents(0, disk.Size(), func(e backends.Extent) bool {
		fmt.Printf("%d bytes at %d, zeroes: %v\n", e.Length, e.Offset, e.Zero)
		return true
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// 4096 bytes at 0, zeroes: true
}

// A program asks step by step what a server has.
func ExampleURI_Negotiate() {
	text, stop := offer()
	defer stop()

	ctx := context.Background()
	uri, err := nbd.ParseURI(text)
	if err != nil {
		log.Fatal(err)
	}
	h, err := uri.Negotiate(ctx, nbd.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	exports, err := h.List(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range exports {
		i, err := h.Info(ctx, e.Name)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s (%s): %d bytes\n", i.Name, i.Description, i.Size)
	}
	// Output:
	// disk (a small disk): 4096 bytes
}

// A client goes on with the connections of another one, which is in another process as a rule: that
// gets the document as JSON, and the files over a Unix socket or as those of a child.
func ExampleClient_HandOver() {
	text, stop := offer()
	defer stop()

	uri, err := nbd.ParseURI(text)
	if err != nil {
		log.Fatal(err)
	}
	before, err := uri.Dial(context.Background(), nbd.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer before.Close()
	if _, err := before.WriteAt([]byte("hello"), 0); err != nil {
		log.Fatal(err)
	}
	h, err := before.HandOver()
	if err != nil {
		log.Fatal(err)
	}
	after, err := uri.Inherit(h.Document, h.Files, nbd.Options{Reconnect: new(nbd.Reconnect)})
	if err != nil {
		h.Resume()
		log.Fatal(err)
	}
	defer after.Close()
	if err := h.Leave(); err != nil {
		log.Fatal(err)
	}
	if _, err := io.Copy(os.Stdout, io.NewSectionReader(after, 0, 5)); err != nil {
		log.Fatal(err)
	}
	// Output:
	// hello
}
