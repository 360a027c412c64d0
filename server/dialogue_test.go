package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestDialogues plays the vectors of testdata/dialogues, byte by byte.
func TestDialogues(t *testing.T) {
	all, err := allDialogues()
	if err != nil {
		t.Fatal(err)
	}
	authority := certs.New(t)
	for begin := 0; begin < len(all); {
		file := all[begin].file
		end := begin
		for end < len(all) && all[end].file == file {
			end++
		}
		t.Run(strings.TrimSuffix(file, ".txt"), func(t *testing.T) {
			for _, d := range all[begin:end] {
				t.Run(d.name, func(t *testing.T) { d.test(t, authority) })
			}
		})
		begin = end
	}
}

// test plays the dialogue with a server.
func (d *dialogue) test(t *testing.T, a *certs.Authority) {
	err := newPlayer(t, d, a).play(d.steps)
	if wrong := d.judge(err); wrong != nil {
		t.Error(wrong)
	} else if err != nil {
		t.Logf("a known fault: %s: %v", d.fault, err)
	}
}

// judge returns what is wrong with an outcome. Where the dialogue tells of a fault, nothing but
// that is to fail.
func (d *dialogue) judge(err error) error {
	var failed *stepError
	switch {
	case d.fault == "":
		return err
	case err == nil:
		return fmt.Errorf("the fault is mended, and its mark may go: %s", d.fault)
	case !errors.As(err, &failed) || failed.step != d.faulty:
		return fmt.Errorf("%w, which is not the known fault: %s", err, d.fault)
	}
	return nil
}

// A player is the client of a dialogue.
type player struct {
	nc       net.Conn      // a *tls.Conn over raw once TLS was begun
	raw      *countedConn  // the socket
	patience time.Duration // with the server, for each step
	config   *tls.Config   // nil: the dialogue has no TLS

	server *server.Server // nil: it knows no shutdown
	held   *heldDisk      // nil: the dialogue has none
}

// A countedConn counts the bytes that were received.
type countedConn struct {
	net.Conn
	received int
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received += n
	return n, err
}

// newPlayer connects to a server that has what the dialogue asks for.
func newPlayer(t testing.TB, d *dialogue, a *certs.Authority) *player {
	t.Helper()
	p := &player{patience: 10 * time.Second, config: trusting(a)}
	p.server = &server.Server{Exports: make(map[string]*server.Export)}
	for _, word := range d.exports {
		if word == "held" {
			p.held = newHeldDisk(t)
			p.server.Exports["held"] = export(t, p.held, server.Options{})
			continue
		}
		e, ok := dialogueExports[word]
		if !ok {
			t.Fatalf("%s:%d: no export %q", d.file, d.line, word)
		}
		p.server.Exports[e.name] = export(t, e.backend(), e.options)
	}
	for _, word := range d.server {
		switch word {
		case "tls", "tls-required":
			p.server.TLS = &tls.Config{Certificates: []tls.Certificate{a.Server}}
			p.server.RequireTLS = word == "tls-required"
		case "few-options":
			p.server.MaxOptions = 3
		default:
			t.Fatalf("%s:%d: no server with %q", d.file, d.line, word)
		}
	}
	p.raw = &countedConn{Conn: serveSocket(t, p.server)}
	p.nc = p.raw
	return p
}

// serveSocket runs s until the test has ended, and returns a connection to it.
func serveSocket(t testing.TB, s *server.Server) net.Conn {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir can be longer than a socket's path may be.
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-ended; err != server.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc
}

// A stepError tells which step of a dialogue has failed.
type stepError struct {
	step int
	at   string
	err  error
}

func (e *stepError) Error() string { return e.at + ": " + e.err.Error() }

func (e *stepError) Unwrap() error { return e.err }

// play plays steps until one fails.
func (p *player) play(steps []step) error {
	for i, s := range steps {
		err := p.raw.SetDeadline(time.Now().Add(p.patience))
		if err == nil {
			err = p.step(s)
		}
		if err != nil {
			return &stepError{i, s.at, err}
		}
	}
	return nil
}

func (p *player) step(s step) error {
	switch s.do {
	case "C":
		return p.say(s.data)
	case "S":
		return p.expect(s.data)
	case "tls":
		return p.startTLS()
	case "close":
		return p.nc.(interface{ CloseWrite() error }).CloseWrite()
	case "end", "goodbye", "cut":
		return p.end(s.do)
	case "held":
		select {
		case <-p.held.entered:
			return nil
		case <-time.After(p.patience):
			return errors.New("the backend is not asked")
		}
	case "release":
		p.held.release()
		return nil
	case "shutdown":
		return p.shutdown()
	}
	return fmt.Errorf("%q is no step", s.do)
}

func (c *countedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

// atOnce is how many bytes of a line are said at once, most often all of them.
const atOnce = 64 << 10

// say writes what the client says.
func (p *player) say(said stream) error {
	for len(said) > 0 {
		b := said.head(atOnce)
		if _, err := p.nc.Write(b); err != nil {
			return err
		}
		said = said.drop(uint64(len(b)))
	}
	return nil
}

// expect reads what the server is to say, up to the first byte that is wrong.
func (p *player) expect(answer stream) error {
	got, read := make([]byte, atOnce), uint64(0)
	for len(answer) > 0 {
		want := answer.head(atOnce)
		n, err := p.nc.Read(got[:len(want)])
		if !bytes.Equal(got[:n], want[:n]) {
			i := 0
			for got[i] == want[i] {
				i++
			}
			from, to := max(0, i-8), min(n, i+40)
			return fmt.Errorf("byte %d is %#02x, want %#02x: %q, want %q",
				read+uint64(i), got[i], want[i], got[from:to], want[from:to])
		}
		read, answer = read+uint64(n), answer.drop(uint64(n))
		if err != nil && len(answer) > 0 {
			return fmt.Errorf("the server has said %d bytes, and %d more are wanted: %w", read, answer.size(), err)
		}
	}
	return nil
}

// startTLS has both sides begin TLS.
func (p *player) startTLS() error {
	over := tls.Client(p.raw, p.config)
	p.nc = over
	return over.Handshake()
}

// end waits for the server to close the connection, without another word. With "goodbye" the end of
// TLS must be told before, and with "cut" an alert of TLS may be said in plain text.
func (p *player) end(how string) error {
	before := p.raw.received
	b, err := io.ReadAll(p.nc)
	switch {
	case how == "cut" && len(b) == alertSize && b[0] == alertType:
	case len(b) > 0:
		return fmt.Errorf("the server says %d bytes more: %q", len(b), b[:min(len(b), 100)])
	}
	if err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the connection stays open: %w", err)
	}
	if how == "goodbye" && p.raw.received == before {
		return errors.New("the end of TLS is not told")
	}
	return nil
}

// An alert of TLS, in plain text.
const alertSize, alertType = 7, 21

// shutdown begins to shut the server down.
func (p *player) shutdown() error {
	go p.server.Shutdown(context.Background())
	return nil
}
