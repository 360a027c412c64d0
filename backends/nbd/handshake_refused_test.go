package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// refusals are the errors that a server can answer, and some that nobody has heard of.
var refusals = []struct {
	number u32
	is     error // of those that programs ask for; nil: none
	says   string
}{
	{refusedUnsupported, errors.ErrUnsupported, "not supported"},
	{refusedPolicy, fs.ErrPermission, "forbidden"},
	{refusedInvalid, nil, "invalid"},
	{refusedPlatform, errors.ErrUnsupported, "platform"},
	{refusedWithoutTLS, nbd.ErrTLSRequired, "TLS"},
	{refusedUnknown, fs.ErrNotExist, "no such export"},
	{refusedShutdown, nil, "shutting down"},
	{refusedBlockSize, nil, "block sizes"},
	{refusedTooBig, nil, "too big"},
	{refusedHeaders, nil, "extended headers"},
	{0x8000000b, nil, "error 11"},
	{0x80000000, nil, "error 0"},
	{0xffffffff, nil, "error 2147483647"},
}

// TestRefused holds what a program learns of a refusal, and that the negotiation goes on behind it.
func TestRefused(t *testing.T) {
	texts := map[string]string{ // What the server says, and what is kept of it.
		"":                    "",
		"why not":             "why not",
		"\u263a":              "\u263a",
		"a\xff\xfeb":          "a\uFFFDb",
		long(4096):            long(4096),
		long(4097):            long(4096),
		long(65536):           long(4096),
		long(4095) + "\u263a": long(4095), // Half a character is none.
		long(4094) + "\xff":   long(4094), // There is no room for one in its place.
	}
	for _, m := range methods {
		if m.name == "export name" { // Such a server can't refuse.
			continue
		}
		for _, r := range refusals {
			for text, kept := range texts {
				if (text != "" && text != "why not") && r.number != refusedPolicy {
					continue // One number will do.
				}
				t.Run(fmt.Sprintf("%s, %#x, %.8q", m.name, r.number, text), func(t *testing.T) {
					turns := greeted(turn{m.says, answer(m.option, r.number, text)})
					if m.name != "abort" {
						turns = append(turns, turn{option(optList), answer(optList, repAck)})
					}
					talk(t, turns, false, func(t *testing.T, nc net.Conn) {
						h := greet(t, nc)
						got, err := m.call(h, context.Background())
						var refused *nbd.OptionError
						if !errors.As(err, &refused) {
							t.Fatalf("%v: %v", got, err)
						}
						if refused.Option != wire.Option(m.option) || refused.Reply != wire.OptionReply(r.number) ||
							refused.Text != kept {
							t.Errorf("%+.80v", refused)
						}
						checkMatches(t, err, r.is)
						if !strings.Contains(err.Error(), r.says) ||
							!strings.Contains(err.Error(), kept[:min(len(kept), 7)]) {
							t.Errorf("%.200v", err)
						}
						if m.name == "abort" {
							return // There is nothing to go on with.
						}
						if _, err := h.List(context.Background()); err != nil {
							t.Errorf("later: %v", err)
						}
					})
				})
			}
		}
	}
}

// checkMatches fails the test unless err matches want, and no other of the errors that programs ask
// for.
func checkMatches(t *testing.T, err, want error) {
	t.Helper()
	for _, e := range []error{errors.ErrUnsupported, fs.ErrPermission, fs.ErrNotExist, nbd.ErrTLSRequired,
		net.ErrClosed} {
		if errors.Is(err, e) != (e == want) {
			t.Errorf("that %v matches %v is %v", err, e, errors.Is(err, e))
		}
	}
}

// TestRefusedInTheMiddle holds that nothing counts that comes before a refusal.
func TestRefusedInTheMiddle(t *testing.T) {
	for name, before := range map[string][]byte{
		"list":          answer(optList, repServer, str("a")),
		"info":          sized(optInfo, 512, 1),
		"go":            sized(optGo, 512, 1),
		"list contexts": answer(optListContexts, repContext, u32(1), "a:b"),
		"set contexts":  answer(optSetContexts, repContext, u32(1), "a:b"),
	} {
		m := the(name)
		talk(t, greeted(turn{m.says, cat(before, answer(m.option, refusedUnknown, "no"))}), false,
			func(t *testing.T, nc net.Conn) {
				got, err := m.call(greet(t, nc), context.Background())
				checkIs(t, err, fs.ErrNotExist)
				if s := fmt.Sprintf("%+v", got); s != "<nil>" && s != "[]" && got != (nbd.Info{}) {
					t.Errorf("%s: there is %s", name, s)
				}
			})
	}
}

// TestAbort holds that it does not matter how a server takes leave.
func TestAbort(t *testing.T) {
	for name, bye := range map[string]func(nc net.Conn){
		"without a word": func(net.Conn) {},
		"half a word":    func(nc net.Conn) { nc.Write(answer(optAbort, repAck)[:7]) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				played := make(chan error, 1)
				go func() {
					played <- speak(server, greeted(turn{option(optAbort), nil}))
					bye(server)
					server.Close()
				}()
				h := greet(t, client)
				if err := h.Abort(context.Background()); err != nil {
					t.Error(err)
				}
				if err := <-played; err != nil {
					t.Error(err)
				}
				if _, err := client.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("the connection is open: %v", err)
				}
				if _, err := h.List(context.Background()); err == nil {
					t.Error("the negotiation goes on")
				}
			})
		})
	}
}
