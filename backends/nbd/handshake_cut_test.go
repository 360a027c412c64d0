package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// A cut is a server's end of a connection that breaks after so many bytes.
type cut struct {
	net.Conn
	says, hears int // what is left of them
}

func (c *cut) Write(p []byte) (int, error) { return c.some(&c.says, c.Conn.Write, p) }
func (c *cut) Read(p []byte) (int, error)  { return c.some(&c.hears, c.Conn.Read, p) }

func (c *cut) some(left *int, do func([]byte) (int, error), p []byte) (int, error) {
	var n int
	if *left > 0 {
		var err error
		if n, err = do(p[:min(len(p), *left)]); err != nil {
			return n, err
		}
	}
	if *left -= n; *left == 0 {
		c.Close()
		return n, net.ErrClosed
	}
	return n, nil
}

// checkCut has a client negotiate with a server that hangs up.
func checkCut(t *testing.T, client, server net.Conn, turns []turn, o nbd.Options, says, hears int) {
	spoken := make(chan struct{})
	go func() {
		defer close(spoken)
		speak(&cut{server, says, hears}, turns)
	}()
	c, err := nbd.New(context.Background(), client, "disk", o)
	<-spoken
	cutOff := false
	for _, e := range []error{io.ErrUnexpectedEOF, io.ErrClosedPipe, syscall.ECONNRESET, syscall.EPIPE} {
		cutOff = cutOff || errors.Is(err, e)
	}
	if c != nil || !cutOff {
		t.Errorf("cut after %d bytes were said and %d were heard: %v: %v", says, hears, c, err)
	}
	if _, err := client.Write([]byte("x")); err == nil {
		t.Errorf("cut after %d bytes: the connection is open", says)
	}
}

// TestCut holds that no client hangs, or goes on, when the server hangs up at any byte that it says
// or hears.
func TestCut(t *testing.T) {
	const never = 1 << 30
	for _, tt := range dialogues {
		t.Run(tt.name, func(t *testing.T) {
			turns := tt.turns[:len(tt.turns)-1] // The last one is after the negotiation.
			says, hears := 0, 0
			for _, turn := range turns {
				says += len(turn.says)
				hears += len(turn.hears)
			}
			for n := range max(says, hears) {
				if n < says {
					synctest.Test(t, func(t *testing.T) {
						client, server := net.Pipe()
						checkCut(t, client, server, turns, tt.options, n, never)
					})
				}
				if n < hears {
					synctest.Test(t, func(t *testing.T) {
						client, server := net.Pipe()
						checkCut(t, client, server, turns, tt.options, never, n)
					})
				}
			}
			for n := range says / 16 { // Sockets have other errors.
				client, server := socketpair(t)
				checkCut(t, client, server, turns, tt.options, n*16, never)
			}
		})
	}
}

// TestContextEnds holds that each method ends with its context, whatever it waits for, and that the
// connection is not used any more then.
func TestContextEnds(t *testing.T) {
	// full is the beginning of an answer, in which there is more to come than any of them has.
	full := func(o u32) []byte {
		switch o {
		case optExportName:
			return cat(u64(512), u16(1), make([]byte, 124))
		case optStartTLS:
			return cat(answer(o, repAck), "\x16\x03\x03")
		}
		return cat(answer(o, refusedPolicy, "half a t"))
	}
	for _, m := range methods {
		answered := full(m.option)
		if m.name == "export name" {
			answered = answered[:9]
		} else if m.name != "tls" {
			answered = answered[:len(answered)-1]
		}
		for _, heard := range []int{0, len(m.says) / 2, len(m.says)} {
			for said := 0; said <= len(answered) && (said == 0 || heard == len(m.says)); said++ {
				t.Run(fmt.Sprintf("%s, %d heard, %d said", m.name, heard, said), func(t *testing.T) {
					turns := greeted(turn{m.says[:heard], answered[:said]})
					checkContextEnds(t, m, turns)
				})
			}
		}
	}
}

func checkContextEnds(t *testing.T, m method, turns []turn) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		go speak(server, turns)
		h := greet(t, client)
		ctx, end := endable(t)
		is := make(chan error, 1)
		go func() {
			_, err := m.call(h, ctx)
			is <- err
		}()
		synctest.Wait() // It waits.
		select {
		case err := <-is:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		end()
		checkIs(t, <-is, errGivenUp)
		if _, err := h.Info(context.Background(), "disk"); !errors.Is(err, errGivenUp) && m.name != "abort" {
			t.Errorf("later: %v", err)
		}
		h.Close()
		server.Close()
	})
}

// TestContextEnded holds that a method whose context is over says nothing, and does no harm.
func TestContextEnded(t *testing.T) {
	talk(t, greeted(turn{option(optList), answer(optList, repAck)}), false, func(t *testing.T, nc net.Conn) {
		h := greet(t, nc)
		ctx, end := endable(t)
		end()
		for _, m := range methods {
			if m.name == "abort" {
				continue // It closes the connection.
			}
			if _, err := m.call(h, ctx); !errors.Is(err, errGivenUp) {
				t.Errorf("%s: %v", m.name, err)
			}
		}
		if _, err := h.List(context.Background()); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		ctx, end := endable(t)
		end()
		_, err := nbd.New(ctx, client, "disk", nbd.Options{})
		checkIs(t, err, errGivenUp)
		if _, err := server.Write([]byte("x")); err == nil {
			t.Error("the connection is open")
		}
	})
}

// TestNewInTime holds that New ends with its context, at any point of the negotiation, and closes
// the connection then.
func TestNewInTime(t *testing.T) {
	for _, tt := range dialogues[:6] {
		turns := tt.turns[:len(tt.turns)-1]
		for n := range turns {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				spoken := make(chan error, 1)
				go func() { spoken <- speak(server, turns[:n]) }()
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				begun := time.Now()
				_, err := nbd.New(ctx, client, "disk", tt.options)
				checkIs(t, err, context.DeadlineExceeded)
				if d := time.Since(begun); d != time.Minute {
					t.Errorf("%s, after %d turns: it took %v", tt.name, n, d)
				}
				if err := <-spoken; err != nil {
					t.Error(err)
				}
				if _, err := server.Write([]byte("x")); err == nil {
					t.Error("the connection is open")
				}
			})
		}
	}
}
