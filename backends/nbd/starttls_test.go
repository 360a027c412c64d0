package nbd_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestTLSRefused holds that a client that wants TLS says nothing without it, whatever the server
// says.
func TestTLSRefused(t *testing.T) {
	config := &tls.Config{ServerName: "localhost"}
	check := func(t *testing.T, err error, nc net.Conn) {
		if err == nil {
			t.Error("it goes on without TLS")
		}
		if _, err := nc.Write([]byte("x")); err == nil {
			t.Error("the connection is open")
		}
	}
	for _, r := range refusals {
		t.Run(r.says, func(t *testing.T) {
			turns := greeted(turn{option(optStartTLS), answer(optStartTLS, r.number, "no")})
			talk(t, turns, false, func(t *testing.T, nc net.Conn) {
				_, err := nbd.New(context.Background(), nc, "disk", nbd.Options{TLS: config})
				check(t, err, nc)
				checkMatches(t, err, r.is)
			})
			talk(t, turns, false, func(t *testing.T, nc net.Conn) {
				o := nbd.Options{TLS: config, Dial: func(context.Context) (net.Conn, error) { return nc, nil }}
				_, err := nbd.URI{Network: "unix", Address: "/s"}.Negotiate(context.Background(), o)
				check(t, err, nc)
				checkMatches(t, err, r.is)
			})
		})
	}
	for _, flags := range []u16{0, 2} {
		talk(t, opening(flags), false, func(t *testing.T, nc net.Conn) {
			_, err := nbd.New(context.Background(), nc, "disk", nbd.Options{TLS: config})
			check(t, err, nc)
			checkIs(t, err, errors.ErrUnsupported)
		})
	}
	t.Run("no name", func(t *testing.T) {
		talk(t, greeted(startTLS), false, func(t *testing.T, nc net.Conn) {
			_, err := nbd.New(context.Background(), nc, "disk", nbd.Options{TLS: new(tls.Config)})
			check(t, err, nc)
		})
	})
}

// TestInjected holds that nothing that stands in plain text behind the server's yes to TLS is taken
// for anything. Whoever is between client and server could have put it there.
func TestInjected(t *testing.T) {
	for name, injected := range map[string][]byte{
		"answers":          cat(answer(optExtended, repAck), hasAllocation.says, hasGo.says),
		"one byte":         {0},
		"a greeting":       greeting(3),
		"data of TLS":      cat("\x17\x03\x03", u16(20), answer(optExtended, repAck)),
		"a goodbye of TLS": cat("\x15\x03\x03", u16(2), "\x01\x00"),
		"an alert of TLS":  cat("\x15\x03\x03", u16(2), "\x02\x28"),
		"a change of TLS":  cat("\x14\x03\x03", u16(1), "\x01", "\x17\x03\x03", u16(20), answer(optExtended, repAck)),
	} {
		t.Run(name, func(t *testing.T) {
			authority := certs.New(t)
			client, server := socketpair(t)
			served := make(chan error, 1)
			go func() {
				plain := greeted(turn{startTLS.hears, cat(startTLS.says, injected)})
				config := &tls.Config{Certificates: []tls.Certificate{authority.Server}}
				served <- secretly(server, plain, config, []turn{hasExtended, hasAllocation, hasGo})
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			c, err := nbd.New(ctx, client, "disk",
				nbd.Options{TLS: &tls.Config{ServerName: "localhost", RootCAs: authority.Pool}})
			if err == nil {
				c.Close()
				t.Fatalf("it is a client, which has agreed on %+v", c.Agreement())
			}
			if ctx.Err() != nil {
				t.Error(err)
			}
			if err := <-served; err == nil {
				t.Error("the server is content")
			}
		})
	}
}

// TestNothingSurvivesTLS holds that what was agreed on in plain text counts no more with TLS, and
// that TLS begins once.
func TestNothingSurvivesTLS(t *testing.T) {
	authority := certs.New(t)
	client, server := socketpair(t)
	served := make(chan error, 1)
	go func() {
		plain := greeted(structuredStep.turn, extendedStep.turn, setStep("disk", "a:b", 0).turn, startTLS)
		config := &tls.Config{Certificates: []tls.Certificate{authority.Server}}
		served <- secretly(server, plain, config, []turn{
			{option(optList), answer(optList, refusedPolicy)},
			{info(optGo, "disk"), cat(sized(optGo, 512, 1), answer(optGo, repAck))},
		})
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	h := greet(t, client)
	for i, s := range []step{structuredStep, extendedStep, setStep("disk", "a:b", 0)} {
		if err := s.call(h, ctx); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	if err := h.StartTLS(ctx, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool}); err != nil {
		t.Fatal(err)
	}
	if _, ok := h.NetConn().(*tls.Conn); !ok {
		t.Errorf("the connection is a %T", h.NetConn())
	}
	if err := h.StartTLS(ctx, stranger); err == nil {
		t.Error("TLS begins twice")
	}
	if _, err := h.List(ctx); !errors.As(err, new(*nbd.OptionError)) {
		t.Error(err)
	}
	s, err := h.Go(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	if a := s.Agreement; a.Structured || a.Extended || a.Contexts != nil || !a.TLS {
		t.Errorf("agreed on %+v", a)
	}
	s.NetConn.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestContextEndsWithTLS holds that a context may end at the moment when TLS has begun: either it
// has, or there is an error.
func TestContextEndsWithTLS(t *testing.T) {
	authority := certs.New(t)
	config := &tls.Config{Certificates: []tls.Certificate{authority.Server}, SessionTicketsDisabled: true}
	for i := range 20 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			client, server := socketpair(t)
			ctx, end := endable(t)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if err := speak(server, greeted(startTLS)); err != nil {
					t.Error(err)
				}
				tls.Server(server, config).Handshake()
				end()
			}()
			h := greet(t, client)
			err := h.StartTLS(ctx, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool})
			if err != nil {
				checkIs(t, err, errGivenUp)
			}
			server.Close()
			h.Close()
			<-ended
		})
	}
}

// An early context tells who was the first to wait for its end, and nobody else, that it has ended.
type early struct {
	context.Context
	never <-chan struct{}
	first func()
	ended atomic.Bool
}

func (e *early) Done() <-chan struct{} { return e.never }

func (e *early) Err() error {
	if e.ended.Load() {
		return context.Canceled
	}
	return nil
}

// AfterFunc is what package context calls instead of waiting for Done.
func (e *early) AfterFunc(f func()) (stop func() bool) {
	if e.first == nil {
		e.first = f
	}
	return func() bool { return true }
}

// A lastWrite is a connection that tells when a client of TLS writes what ends the handshake.
type lastWrite struct {
	net.Conn
	tell func()
}

func (w lastWrite) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if len(p) > 0 && p[0] == 0x14 { // change_cipher_spec comes first in it
		w.tell()
	}
	return n, err
}

// TestContextEndsBehindTLS is for the race detector: the context ends when package tls has done its
// part, and the connection is being replaced by that over TLS.
func TestContextEndsBehindTLS(t *testing.T) {
	authority := certs.New(t)
	config := &tls.Config{Certificates: []tls.Certificate{authority.Server}}
	client, server := socketpair(t)
	served := make(chan error, 1)
	go func() { served <- secretly(server, greeted(startTLS), config, nil) }()
	ctx := &early{Context: context.Background(), never: make(chan struct{})}
	told := 0
	h := greet(t, lastWrite{client, func() {
		told++
		ctx.ended.Store(true)
		ctx.first()
	}})
	h.StartTLS(ctx, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool})
	if told != 1 {
		t.Errorf("the context has ended %d times", told)
	}
	h.Close()
	<-served // TLS may miss its goodbye.
}
