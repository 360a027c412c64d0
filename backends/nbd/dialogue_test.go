package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// A turn of a dialogue is what the client has to say, and what the server says then.
type turn struct{ hears, says []byte }

// opening is how every dialogue begins with a server that has these flags, and a client that knows
// two of them.
func opening(flags u16) []turn { return []turn{{nil, greeting(flags)}, {cat(u32(flags & 3)), nil}} }

// fixed is what a server of our time has.
const fixed u16 = 3

// greeted is a dialogue behind the usual opening.
func greeted(turns ...turn) []turn { return append(opening(fixed), turns...) }

// errLeft is what speak returns when the client hangs up in the middle of what the server says.
var errLeft = errors.New("the client has not listened to the end")

// speak speaks a server's part, and returns what is wrong with the client's.
func speak(nc net.Conn, turns []turn) error {
	for _, turn := range turns {
		heard := make([]byte, len(turn.hears))
		if n, err := io.ReadFull(nc, heard); err != nil || !bytes.Equal(heard, turn.hears) {
			return fmt.Errorf("the client says\n%q instead of\n%q (%v)", heard[:n], turn.hears, err)
		}
		if len(turn.says) == 0 {
			continue // A pipe waits for somebody who reads nothing.
		}
		if _, err := nc.Write(turn.says); err != nil {
			return errLeft
		}
	}
	return nil
}

// play speaks a server's part, and waits for the client to hang up, which is not to say more
// before.
func play(nc net.Conn, turns []turn) error {
	defer nc.Close()
	if err := speak(nc, turns); err != nil {
		return err
	}
	if more, err := io.ReadAll(nc); len(more) > 0 {
		return fmt.Errorf("the client goes on with %q (%v)", more, err)
	}
	return nil
}

// talk has f talk to a server that speaks its part of the dialogue, in a bubble: where nobody says
// anything any more, the test fails at once. The server must have heard all of the client's part,
// and nothing more. Where it is wrong, the client need not listen to the end.
func talk(t *testing.T, turns []turn, wrong bool, f func(t *testing.T, nc net.Conn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Helper()
		client, server := net.Pipe()
		played := make(chan error, 1)
		go func() { played <- play(server, turns) }()
		f(t, client)
		client.Close()
		if err := <-played; err != nil && (err != errLeft || !wrong) {
			t.Error(err)
		}
	})
}

// greet begins a negotiation.
func greet(t testing.TB, nc net.Conn) *nbd.Handshake {
	t.Helper()
	h, err := nbd.Greet(context.Background(), nc)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// A method is one of a Handshake, with arguments for an export "disk".
type method struct {
	name   string
	says   []byte // what the client says
	option u32
	call   func(h *nbd.Handshake, ctx context.Context) (any, error)
}

// methods are all that ask something. StartTLS has tests of its own for what comes behind it.
var methods = []method{
	{"extended", option(optExtended), optExtended, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return nil, h.ExtendedHeaders(ctx)
	}},
	{"structured", option(optStructured), optStructured, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return nil, h.StructuredReplies(ctx)
	}},
	{"list contexts", contexts(optListContexts, "disk", "base:"), optListContexts,
		func(h *nbd.Handshake, ctx context.Context) (any, error) { return h.ListContexts(ctx, "disk", "base:") }},
	{"set contexts", contexts(optSetContexts, "disk", "a:b", "c:d"), optSetContexts,
		func(h *nbd.Handshake, ctx context.Context) (any, error) {
			return h.SetContexts(ctx, "disk", "a:b", "c:d")
		}},
	{"list", option(optList), optList, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return h.List(ctx)
	}},
	{"info", info(optInfo, "disk"), optInfo, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return h.Info(ctx, "disk")
	}},
	{"go", info(optGo, "disk"), optGo, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		s, err := h.Go(ctx, "disk")
		if err != nil {
			return nil, err
		}
		return s.Agreement, nil
	}},
	{"export name", option(optExportName, "disk"), optExportName,
		func(h *nbd.Handshake, ctx context.Context) (any, error) {
			s, err := h.ExportName(ctx, "disk")
			if err != nil {
				return nil, err
			}
			return s.Agreement, nil
		}},
	{"abort", option(optAbort), optAbort, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return nil, h.Abort(ctx)
	}},
	{"tls", option(optStartTLS), optStartTLS, func(h *nbd.Handshake, ctx context.Context) (any, error) {
		return nil, h.StartTLS(ctx, stranger)
	}},
}

// the returns the method of a name.
func the(name string) method {
	for _, m := range methods {
		if m.name == name {
			return m
		}
	}
	panic(name)
}
