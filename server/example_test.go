package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A server offers exports by name to whoever connects: qemu, nbd-client, nbdcopy.
func ExampleServer() {
	// A *strings.Reader is a backend that can't be written. Any type with ReadAt and Size will do.
	image := strings.NewReader(strings.Repeat("content ", 512))
	export, err := server.NewExport(image, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	srv := &server.Server{Exports: map[string]*server.Export{"image": export}}
	// Nobody is asked who he is, and nothing is encrypted: mind who can reach the listener.
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()

	client, err := dialExport(l.Addr(), "image")
	if err != nil {
		log.Fatal(err)
	}
	data, err := client.read(8, 7)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%q\n", data)

	// Shutdown answers what was asked, and then disconnects the clients. After it the backend may
	// be closed.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		log.Print(err) // A backend hangs: Close cuts the connections.
	}
	if err := <-served; !errors.Is(err, server.ErrServerClosed) {
		log.Fatal(err) // The listener has failed.
	}
	// Output:
	// "content"
}

// Clients that have no certificate of ours are told nothing, not even which exports there are.
func ExampleServer_tls() {
	export, err := server.NewExport(strings.NewReader("content of an image"), server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	certificate, clients, err := readCertificates()
	if err != nil {
		log.Fatal(err)
	}
	srv := &server.Server{
		Exports: map[string]*server.Export{"": export},
		TLS: &tls.Config{
			Certificates: []tls.Certificate{certificate},
			ClientCAs:    clients,
			ClientAuth:   tls.RequireAndVerifyClientCert,
		},
		RequireTLS: true,
	}
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(srv.Serve(l))
}

// readCertificates reads what the example is about.
func readCertificates() (tls.Certificate, *x509.CertPool, error) {
	authority, err := os.ReadFile("ca-cert.pem")
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		return tls.Certificate{}, nil, errors.New("ca-cert.pem has no certificate")
	}
	own, err := tls.LoadX509KeyPair("server-cert.pem", "server-key.pem")
	return own, pool, err
}

// A program that has its sockets from elsewhere, as from inetd or behind a proxy, serves one at a
// time.
func ExampleServer_Handshake() {
	export, err := server.NewExport(strings.NewReader("content of an image"), server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	socket, other := net.Pipe()
	go askOnce(other)

	// The client says which export it wants. One that knows no handshake, as the Linux kernel, is
	// served without (Export.NewConn).
	srv := &server.Server{Exports: map[string]*server.Export{"": export}}
	session, err := srv.Handshake(socket)
	if err != nil {
		log.Fatal(err)
	}
	conn := session.Conn()
	// Transmit returns when the client has gone. Another goroutine may call conn.Shutdown, or
	// conn.Close.
	if err := conn.Transmit(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("requests:", conn.Stats().Read.Requests)
	if err := conn.Close(); err != nil { // It closes the socket, which Transmit does not.
		log.Fatal(err)
	}
	// Output:
	// requests: 1
}

// Clients at work get another backend under them. Each request is executed as a whole by the old or
// by the new one.
func ExampleExport_Swap() {
	const size = 4096
	version1 := strings.NewReader(strings.Repeat("1", size))
	version2 := strings.NewReader(strings.Repeat("2", size))
	export, err := server.NewExport(version1, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	// A client reads all of it, again and again, and tells of each version that it sees.
	socket, other := net.Pipe()
	seen := make(chan string, 2)
	go readUntil(other, size, "2", seen)
	conn := export.NewConn(socket, nil)
	served := make(chan error, 1)
	go func() { served <- conn.Transmit() }()
	fmt.Println("version", <-seen)

	// The sizes are the same, and the new one can do all that clients were promised. That it has
	// the right content is the caller's matter: SwapFunc lets one copy it while requests wait.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := export.Swap(ctx, version2); err != nil {
		log.Fatal(err) // The old one stays, and requests go on.
	}
	// Now version1 is not used any more, and could be closed.
	fmt.Println("version", <-seen)
	if err := errors.Join(<-served, conn.Close()); err != nil {
		log.Fatal(err)
	}
	// Output:
	// version 1
	// version 2
}

// A guest is the client of these examples, as small as can be: one request at a time.
type guest struct{ nc net.Conn }

// dialExport connects to a server and asks for an export.
func dialExport(addr net.Addr, name string) (guest, error) {
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		return guest{}, err
	}
	return guest{nc}, guest{nc}.ask(name)
}

// ask is the handshake.
func (g guest) ask(name string) error {
	_, err := io.ReadFull(g.nc, make([]byte, len(greeting)))
	if err == nil {
		_, err = io.WriteString(g.nc, clientFlags(3)+option(optExportName, name))
	}
	if err == nil {
		_, err = io.ReadFull(g.nc, make([]byte, len(sizeDefault+flagsDefault)))
	}
	return err
}

func (g guest) read(off uint64, n int) (string, error) {
	if _, err := g.nc.Write(call{op: cmdRead, offset: off, length: uint32(n)}.encode(0)); err != nil {
		return "", err
	}
	p, err := readReply(g.nc, func(uint64) int { return n })
	if err == nil && p.errno != 0 {
		err = fmt.Errorf("error %d", p.errno)
	}
	return string(p.data), err
}

// leave says goodbye and closes the socket.
func (g guest) leave() error {
	_, err := g.nc.Write(call{op: cmdDisc}.encode(0))
	return errors.Join(err, g.nc.Close())
}

// askOnce asks for the export without a name, reads from it and leaves.
func askOnce(nc net.Conn) {
	g := guest{nc}
	err := g.ask("")
	if err == nil {
		_, err = g.read(0, 7)
	}
	if err := errors.Join(err, g.leave()); err != nil {
		log.Fatal(err)
	}
}

// readUntil reads the first n bytes until they are those of the last version, and leaves. A version
// is a byte, repeated.
func readUntil(nc net.Conn, n int, last string, seen chan<- string) {
	g := guest{nc}
	for version := ""; version != last; {
		data, err := g.read(0, n)
		if err != nil {
			log.Fatal(err)
		}
		if strings.Trim(data, data[:1]) != "" {
			log.Fatalf("a mixture of versions: %q", data)
		}
		if data[:1] != version {
			version = data[:1]
			seen <- version
		}
	}
	if err := g.leave(); err != nil {
		log.Fatal(err)
	}
}
