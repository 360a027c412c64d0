package server_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

// TestNegotiate holds what a client is answered that asks for structured replies and meta contexts,
// in any order, and what was agreed on in the end ("NBD_OPT_STRUCTURED_REPLY", "Metadata
// querying").
func TestNegotiate(t *testing.T) {
	const alloc = "base:allocation"
	structured := option(optStructured, "")
	ack := optionReply(optStructured, repAck, "")
	contexts := []server.Context{{ID: 1, Name: alloc}}
	listed := optionReply(optListMeta, repMetaContext, "\x00\x00\x00\x00"+alloc) + optionReply(optListMeta, repAck, "")
	set := optionReply(optSetMeta, repMetaContext, "\x00\x00\x00\x01"+alloc) + optionReply(optSetMeta, repAck, "")
	first := "NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS comes first"
	for _, tt := range []struct {
		name     string
		said     string // before NBD_OPT_EXPORT_NAME
		answer   string
		simple   bool // replies, in the end
		contexts []server.Context
	}{
		{name: "nothing", simple: true},
		{name: "structured", said: structured, answer: ack},
		{name: "structured twice", said: structured + structured, answer: ack + ack},
		{name: "structured, with data", said: option(optStructured, "x"), simple: true,
			answer: optionReply(optStructured, errInvalid, "the option takes no data")},
		{name: "list before structured", said: option(optListMeta, metaData("disk")), simple: true,
			answer: optionReply(optListMeta, errInvalid, first)},
		{name: "set before structured", said: option(optSetMeta, metaData("disk", alloc)) + structured,
			answer: optionReply(optSetMeta, errInvalid, first) + ack},
		{name: "list all", said: structured + option(optListMeta, metaData("disk")), answer: ack + listed},
		{name: "list a namespace", said: structured + option(optListMeta, metaData("disk", "base:")),
			answer: ack + listed},
		{name: "list one", said: structured + option(optListMeta, metaData("", "x:y", alloc)), answer: ack + listed},
		{name: "list what is not there", said: structured + option(optListMeta, metaData("disk", "x:", "x", "")),
			answer: ack + optionReply(optListMeta, repAck, "")},
		{name: "set", said: structured + option(optSetMeta, metaData("disk", "x:y", alloc, alloc)), answer: ack + set,
			contexts: contexts},
		{name: "set none", said: structured + option(optSetMeta, metaData("disk")),
			answer: ack + optionReply(optSetMeta, repAck, "")},
		{name: "set a namespace", said: structured + option(optSetMeta, metaData("disk", "base:")),
			answer: ack + optionReply(optSetMeta, repAck, "")},
		{name: "set for another export", said: structured + option(optSetMeta, metaData("", alloc)), answer: ack + set},
		{name: "set, then list", said: structured + option(optSetMeta, metaData("disk", alloc)) +
			option(optListMeta, metaData("", alloc)), answer: ack + set + listed, contexts: contexts},
		{name: "set, then none", said: structured + option(optSetMeta, metaData("disk", alloc)) +
			option(optSetMeta, metaData("disk")), answer: ack + set + optionReply(optSetMeta, repAck, "")},
		{name: "set, then what fails", said: structured + option(optSetMeta, metaData("disk", alloc)) +
			option(optSetMeta, metaData("no", alloc)),
			answer: ack + set + optionReply(optSetMeta, errUnknown, "no such export")},
		{name: "set, then what is malformed", said: structured + option(optSetMeta, metaData("disk", alloc)) +
			option(optSetMeta, metaData("disk", alloc)[:20]),
			answer: ack + set + optionReply(optSetMeta, errInvalid, "malformed data")},
		{name: "too many queries", said: structured + option(optSetMeta, metaData("disk")[:8]+"\xff\xff\xff\xff"),
			answer: ack + optionReply(optSetMeta, errInvalid, "malformed data")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &talker{in: strings.NewReader(clientFlags(3) + tt.said + option(optExportName, "disk"))}
			s := &server.Server{Exports: exports(t)}
			session, err := s.Handshake(c)
			if err != nil {
				t.Fatal(err)
			}
			session.Conn().Close()
			flags := "\x01\x83" // has-flags, read-only, DF, multi-conn
			want := server.Agreement{
				Export: "disk", Size: 8192, BlockSize: 512, Flags: 0x183, Structured: true, Contexts: tt.contexts,
			}
			if tt.simple {
				flags, want.Flags, want.Structured = flagsDisk, 0x103, false
			}
			if diff := cmp.Diff(greeting+tt.answer+sizeDisk+flags, c.out.String()); diff != "" {
				t.Errorf("the server said (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(want, session.Agreement); diff != "" {
				t.Errorf("agreed on (-want +got):\n%s", diff)
			}
		})
	}
}
