package nbd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestGreet holds what a client answers to the flags of a server: those of them that it knows.
func TestGreet(t *testing.T) {
	for flags, want := range map[u16]u32{0: 0, 1: 1, 2: 2, 3: 3, 0x8003: 3, 0xffff: 3, 0xfffc: 0} {
		talk(t, []turn{{nil, greeting(flags)}, {cat(want), nil}}, false, func(t *testing.T, nc net.Conn) {
			if h := greet(t, nc); h.NetConn() != nc {
				t.Errorf("NetConn returns %v", h.NetConn())
			}
		})
	}
}

// TestDialogues holds what the client says with each method, and what it makes of the answer.
func TestDialogues(t *testing.T) {
	tests := []struct {
		name string
		method
		answer []byte
		want   any
	}{
		{"", the("extended"), answer(optExtended, repAck), nil},
		{"", the("structured"), answer(optStructured, repAck), nil},
		{"", the("list"), cat(
			answer(optList, repServer, str("a"), "what people \x00 read \xff"),
			answer(optList, repServer, str("")),
			answer(optList, repServer, str(long(4096)), long(60000)),
			answer(optList, repAck),
		), []nbd.Listed{{Name: "a", Details: "what people \x00 read \uFFFD"}, {},
			{Name: long(4096), Details: long(60000)}}},
		{"nothing", the("list"), answer(optList, repAck), []nbd.Listed(nil)},
		{"", the("list contexts"), cat(
			answer(optListContexts, repContext, u32(0), "base:allocation"),
			answer(optListContexts, repContext, u32(0), "base:"+long(4091)),
			answer(optListContexts, repContext, u32(0xffffffff), "what nobody asked for"),
			answer(optListContexts, repAck),
		), nbd.Contexts{{Name: "base:allocation"}, {Name: "base:" + long(4091)},
			{Name: "what nobody asked for", ID: 0xffffffff}}},
		{"nothing", the("list contexts"), answer(optListContexts, repAck), nbd.Contexts(nil)},
		{"", the("set contexts"), cat(
			answer(optSetContexts, repContext, u32(0xffffffff), "c:d"),
			answer(optSetContexts, repContext, u32(0), "a:b"),
			answer(optSetContexts, repAck),
		), nbd.Contexts{{Name: "c:d", ID: 0xffffffff}, {Name: "a:b"}}},
		{"", the("info"), cat(
			answer(optInfo, repInfo, infoDescription, "a disk, \u263a"),
			answer(optInfo, repInfo, u16(0xfff0), "what no client knows \xff"),
			sized(optInfo, 0x123456789a, 0x0107),
			answer(optInfo, repInfo, infoBlockSize, u32(1), u32(4096), u32(0xffffffff)),
			answer(optInfo, repInfo, infoName, "another name"),
			answer(optInfo, repAck),
		), nbd.Info{Name: "another name", Description: "a disk, \u263a", Size: 0x123456789a, Flags: 0x107,
			BlockSizes: wire.BlockSizes{Minimum: 1, Preferred: 4096, Maximum: 0xffffffff}}},
		{"the least", the("info"), cat(sized(optInfo, 0, 0), answer(optInfo, repAck)),
			nbd.Info{Name: "disk", Flags: 1}},
		{"the greatest", the("info"), cat(
			sized(optInfo, 1<<63-1, 0xffff),
			answer(optInfo, repInfo, infoBlockSize, u32(0x10000), u32(1<<31), u32(1<<31)),
			answer(optInfo, repInfo, infoName, long(4096)),
			answer(optInfo, repInfo, infoDescription, long(4096)),
			answer(optInfo, repAck),
		), nbd.Info{Name: long(4096), Description: long(4096), Size: 1<<63 - 1, Flags: 0xffff,
			BlockSizes: wire.BlockSizes{Minimum: 65536, Preferred: 1 << 31, Maximum: 1 << 31}}},
		{"flags without the flag that there are some", the("info"),
			cat(sized(optInfo, 512, 0xfffe), answer(optInfo, repAck)),
			nbd.Info{Name: "disk", Size: 512, Flags: 1}},
		{"", the("go"), cat(sized(optGo, 512, 3), answer(optGo, repAck)),
			nbd.Agreement{Info: nbd.Info{Name: "disk", Size: 512, Flags: 3}}},
		{"", the("export name"), cat(u64(512), u16(3)),
			nbd.Agreement{Info: nbd.Info{Name: "disk", Size: 512, Flags: 3}}},
		{"", the("abort"), answer(optAbort, repAck), nil},
	}
	for _, tt := range tests {
		t.Run(strings.TrimSpace(tt.method.name+" "+tt.name), func(t *testing.T) {
			talk(t, greeted(turn{tt.says, tt.answer}), false, func(t *testing.T, nc net.Conn) {
				got, err := tt.call(greet(t, nc), context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, got, cmpopts.IgnoreUnexported(nbd.Info{})); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		})
	}
}

// TestBehindTheNegotiation holds that no byte is read that is not of the negotiation any more.
func TestBehindTheNegotiation(t *testing.T) {
	const next = "what comes next"
	tests := []struct {
		name   string
		flags  u16
		method method
		answer []byte
	}{
		{"GO", 3, the("go"), cat(sized(optGo, 512, 1), answer(optGo, repAck))},
		{"EXPORT_NAME", 3, the("export name"), cat(u64(512), u16(1))},
		{"EXPORT_NAME with zeroes", 1, the("export name"), cat(u64(512), u16(1), make([]byte, 124))},
		{"EXPORT_NAME, not fixed", 0, the("export name"), cat(u64(512), u16(1), make([]byte, 124))},
		{"EXPORT_NAME with zeroes that are none", 1, the("export name"), cat(u64(512), u16(1), long(124))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			turns := append(opening(tt.flags), turn{tt.method.says, cat(tt.answer, next)})
			talk(t, turns, false, func(t *testing.T, nc net.Conn) {
				h := greet(t, nc)
				if _, err := tt.method.call(h, context.Background()); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(next))
				if _, err := io.ReadFull(nc, got); err != nil || string(got) != next {
					t.Errorf("%q is left (%v)", got, err)
				}
				_, err := h.List(context.Background())
				checkIs(t, err, net.ErrClosed) // The negotiation is over.
			})
		})
	}
}

// A step is a turn with the call that makes the client say its part.
type step struct {
	turn
	call func(h *nbd.Handshake, ctx context.Context) error
}

// The steps of TestAgreement.
var (
	structuredStep = step{turn{option(optStructured), answer(optStructured, repAck)},
		(*nbd.Handshake).StructuredReplies}
	extendedStep = step{turn{option(optExtended), answer(optExtended, repAck)}, (*nbd.Handshake).ExtendedHeaders}
)

// setStep chooses a context that the server has, or, with an error of its, does not.
func setStep(export, name string, refusal u32) step {
	heard := cat(answer(optSetContexts, repContext, u32(3), name), answer(optSetContexts, repAck))
	if refusal != 0 {
		heard = cat(answer(optSetContexts, repContext, u32(3), name), answer(optSetContexts, refusal))
	}
	return step{turn{contexts(optSetContexts, export, name), heard}, func(h *nbd.Handshake, ctx context.Context) error {
		got, err := h.SetContexts(ctx, export, name)
		if refusal != 0 && errors.As(err, new(*nbd.OptionError)) && got == nil {
			return nil
		}
		return err
	}}
}

// TestAgreement holds what of a negotiation is in its session, in whatever order it was agreed on.
func TestAgreement(t *testing.T) {
	agreed := nbd.Contexts{{Name: "a:b", ID: 3}}
	tests := []struct {
		name  string
		steps []step
		want  nbd.Agreement
	}{
		{"nothing", nil, nbd.Agreement{}},
		{"structured replies", []step{structuredStep}, nbd.Agreement{Structured: true}},
		{"extended headers", []step{extendedStep}, nbd.Agreement{Structured: true, Extended: true}},
		{"both", []step{structuredStep, extendedStep}, nbd.Agreement{Structured: true, Extended: true}},
		{"contexts", []step{structuredStep, setStep("disk", "a:b", 0)},
			nbd.Agreement{Structured: true, Contexts: agreed}},
		{"contexts twice", []step{structuredStep, setStep("disk", "x:y", 0), setStep("disk", "a:b", 0)},
			nbd.Agreement{Structured: true, Contexts: agreed}},
		{"contexts of another export", []step{structuredStep, setStep("disc", "a:b", 0)},
			nbd.Agreement{Structured: true}},
		{"contexts, and then those of another export",
			[]step{structuredStep, setStep("disk", "a:b", 0), setStep("", "a:b", 0)},
			nbd.Agreement{Structured: true}},
		{"contexts, and then refused ones", []step{structuredStep, setStep("disk", "a:b", 0),
			setStep("disk", "a:b", refusedTooBig)},
			nbd.Agreement{Structured: true}},
		{"contexts before extended headers", []step{structuredStep, setStep("disk", "a:b", 0), extendedStep},
			nbd.Agreement{Structured: true, Extended: true}},
		{"contexts before structured replies", []step{structuredStep, setStep("disk", "a:b", 0), structuredStep},
			nbd.Agreement{Structured: true}},
	}
	ends := map[string]turn{
		"go": {info(optGo, "disk"), cat(sized(optGo, 0, 1), answer(optGo, repInfo, infoName, "disc"),
			answer(optGo, repAck))},
		"export name": {option(optExportName, "disk"), cat(u64(0), u16(1))},
	}
	for _, tt := range tests {
		for end, last := range ends {
			t.Run(tt.name+", "+end, func(t *testing.T) {
				var turns []turn
				for _, s := range tt.steps {
					turns = append(turns, s.turn)
				}
				talk(t, greeted(append(turns, last)...), false, func(t *testing.T, nc net.Conn) {
					h := greet(t, nc)
					for i, s := range tt.steps {
						if err := s.call(h, context.Background()); err != nil {
							t.Fatalf("step %d: %v", i, err)
						}
					}
					got, err := the(end).call(h, context.Background())
					if err != nil {
						t.Fatal(err)
					}
					tt.want.Info = nbd.Info{Name: "disk", Flags: 1}
					if end == "go" {
						tt.want.Name = "disc" // That the server has another name for it does not matter to contexts.
					}
					if diff := cmp.Diff(tt.want, got, cmpopts.IgnoreUnexported(nbd.Info{})); diff != "" {
						t.Errorf("-want +got:\n%s", diff)
					}
				})
			})
		}
	}
}

// TestTextsOfTheCaller holds that what is no string of the protocol is refused, and never sent.
func TestTextsOfTheCaller(t *testing.T) {
	for _, text := range []string{long(4097), "a\x00b", "\xff"} {
		talk(t, greeted(turn{option(optList), answer(optList, repAck)}), false, func(t *testing.T, nc net.Conn) {
			h, ctx := greet(t, nc), context.Background()
			for name, call := range map[string]func() error{
				"Info":         func() error { _, err := h.Info(ctx, text); return err },
				"Go":           func() error { _, err := h.Go(ctx, text); return err },
				"ExportName":   func() error { _, err := h.ExportName(ctx, text); return err },
				"ListContexts": func() error { _, err := h.ListContexts(ctx, "disk", "base:", text); return err },
				"SetContexts":  func() error { _, err := h.SetContexts(ctx, text); return err },
			} {
				if err := call(); err == nil || errors.As(err, new(*nbd.ProtocolError)) {
					t.Errorf("%s of %.20q: %v", name, text, err)
				}
			}
			if _, err := h.List(ctx); err != nil { // Nothing has happened to the connection.
				t.Error(err)
			}
		})
	}
}
