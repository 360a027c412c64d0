package server_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	optExtended = 11

	errExtended = 1<<31 + 10

	payloadLen = 1 << 5

	chunkStatusExt = 6
)

// encodeExtended is encode with an extended header, and that length.
func (q call) encodeExtended(cookie, length uint64) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x21e41c71)
	b = binary.BigEndian.AppendUint16(b, q.flags)
	b = binary.BigEndian.AppendUint16(b, q.op)
	return append(append(b, be64(cookie)+be64(q.offset)+be64(length)...), q.data...)
}

// readExtended reads one reply with extended headers, of which it checks magic, cookie, offset and
// flags.
func readExtended(r io.Reader, cookie, offset uint64) (all []chunk, err error) {
	for {
		var h [32]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return all, err
		}
		flags := binary.BigEndian.Uint16(h[4:])
		if got := string(h[:4]) + string(h[8:24]); got != "\x6e\x8a\x27\x8c"+be64(cookie)+be64(offset) || flags > 1 {
			return all, fmt.Errorf("header %x, cookie is %d, offset %d", h, cookie, offset)
		}
		n := binary.BigEndian.Uint64(h[24:])
		if n > 64<<20 {
			return all, fmt.Errorf("a chunk of %d bytes", n)
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(r, payload); err != nil {
			return all, err
		}
		all = append(all, chunk{binary.BigEndian.Uint16(h[6:]), string(payload)})
		if flags == 1 {
			return all, nil
		}
	}
}

const boundlessSize = 1 << 50

// boundless is a disk of zeroes that passes on what it is asked to do.
type boundless chan string

func (v boundless) Size() int64 { return boundlessSize }

func (v boundless) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (v boundless) note(op string, off, n int64) { v <- fmt.Sprintf("%s %d+%d", op, off, n) }

func (v boundless) WriteAt(p []byte, off int64) (int, error) {
	v.note("write "+string(p[:1]), off, int64(len(p)))
	return len(p), nil
}

func (v boundless) Trim(off, n int64) error {
	v.note("trim", off, n)
	return nil
}

func (v boundless) Zero(off, n int64, f backends.ZeroFlags) error {
	v.note(fmt.Sprintf("zero %d", f), off, n)
	return nil
}

func (v boundless) Extents(off, n int64, yield func(backends.Extent) bool) error {
	if yield(backends.Extent{Offset: off, Length: n / 2}) {
		yield(backends.Extent{Offset: off + n/2, Length: n - n/2, Hole: true, Zero: true})
	}
	return nil
}

// statusExt encodes the payload of a chunk with 64-bit extents from lengths and flags.
func statusExt(extents ...uint64) chunk {
	payload := be32(1) + be32(uint32(len(extents)/2))
	for _, n := range extents {
		payload += be64(n)
	}
	return chunk{chunkStatusExt, payload}
}

// TestExtended holds what a client is answered that has extended headers ("Request message",
// "Extended reply chunk message", "NBD_CMD_FLAG_PAYLOAD_LEN").
func TestExtended(t *testing.T) {
	none := []chunk{{chunkNone, ""}}
	const unknown = "flag unknown, or not for this request type"
	written := bytes.Repeat([]byte("w"), 100000)
	for _, tt := range []struct {
		name  string
		q     call
		n     uint64
		asked string
		want  []chunk
	}{
		{name: "read", q: call{op: cmdRead, offset: 1 << 40}, n: 5, want: []chunk{data(1<<40, make([]byte, 5))}},
		{name: "read nothing", q: call{op: cmdRead, offset: 512}, want: none},
		{name: "read too much", q: call{op: cmdRead}, n: 1 << 32,
			want: []chunk{failure(einval, "longer than the longest request allowed")}},
		{name: "read, DF", q: call{op: cmdRead, flags: flagDF}, n: 1, want: []chunk{data(0, make([]byte, 1))}},
		{name: "read with a payload", q: call{op: cmdRead, flags: payloadLen, data: []byte("abc")}, n: 3,
			want: []chunk{failure(einval, unknown)}},
		{name: "write", q: call{op: cmdWrite, flags: payloadLen, offset: 7, data: written}, n: 100000,
			asked: "write w 7+100000", want: none},
		{name: "write nothing", q: call{op: cmdWrite, flags: payloadLen}, want: none},
		{name: "write without the flag", q: call{op: cmdWrite, offset: 7, data: written}, n: 100000,
			asked: "write w 7+100000", want: none},
		{name: "write past the end", n: 1,
			q:    call{op: cmdWrite, flags: payloadLen, offset: boundlessSize, data: []byte("x")},
			want: []chunk{failure(enospc, "past the end of the export")}},
		{name: "trim", q: call{op: cmdTrim, offset: 1 << 41}, n: 1 << 40, asked: "trim 2199023255552+1099511627776",
			want: none},
		{name: "trim all", q: call{op: cmdTrim}, n: boundlessSize, asked: "trim 0+1125899906842624", want: none},
		{name: "trim more", q: call{op: cmdTrim, offset: 1}, n: boundlessSize,
			want: []chunk{failure(einval, "past the end of the export")}},
		{name: "trim up to the beginning", q: call{op: cmdTrim, offset: 2}, n: 1<<64 - 1,
			want: []chunk{failure(einval, "past the end of the export")}},
		{name: "trim with a payload", q: call{op: cmdTrim, flags: payloadLen, data: written}, n: 100000,
			want: []chunk{failure(einval, unknown)}},
		{name: "zeroes", q: call{op: cmdZero}, n: 1 << 40, asked: "zero 0 0+1099511627776", want: none},
		{name: "zeroes, no hole", q: call{op: cmdZero, flags: noHole}, n: 1<<32 + 1, asked: "zero 1 0+4294967297",
			want: none},
		{name: "zeroes past the end", q: call{op: cmdZero, offset: 1 << 49}, n: 1 << 63,
			want: []chunk{failure(enospc, "past the end of the export")}},
		{name: "flush", q: call{op: cmdFlush}, want: none},
		{name: "status", q: call{op: cmdBlockStatus}, n: boundlessSize, want: []chunk{statusExt(1<<49, 0, 1<<49, 3)}},
		{name: "status of one", q: call{op: cmdBlockStatus, flags: reqOne, offset: 1 << 40}, n: 1 << 33,
			want: []chunk{statusExt(1<<32, 0)}},
		{name: "status past the end", q: call{op: cmdBlockStatus}, n: 1<<63 - 1,
			want: []chunk{failure(einval, "past the end of the export")}},
		{name: "unknown", q: call{op: 99}, n: 1 << 50, want: []chunk{failure(einval, "unknown request type")}},
		{name: "unknown with a payload", q: call{op: 99, flags: payloadLen, data: []byte("abc")}, n: 3,
			want: []chunk{failure(einval, "unknown request type")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := make(boundless, 8)
			nc := withOptions(t, v, server.Options{}, option(optExtended, ""),
				option(optSetMeta, metaData("x", "base:allocation")))
			// Replies of others stand before and behind it in the batch.
			before, after := call{op: cmdRead, offset: 1}, call{op: cmdRead, offset: 3}
			stream := append(before.encodeExtended(1, 1), tt.q.encodeExtended(2, tt.n)...)
			go nc.Write(append(stream, after.encodeExtended(3, 2)...))
			got, err := extendedReplies(nc, map[uint64]uint64{1: 1, 2: tt.q.offset, 3: 3})
			if err != nil {
				t.Fatal(err)
			}
			want := map[uint64][]chunk{1: {data(1, make([]byte, 1))}, 2: tt.want, 3: {data(3, make([]byte, 2))}}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			asked := ""
			if len(v) > 0 {
				asked = <-v
			}
			if asked != tt.asked || len(v) > 0 {
				t.Errorf("the backend was asked to %s, want %s", asked, tt.asked)
			}
		})
	}
}

// extendedReplies reads the replies to requests, given as the offset of each cookie, in whatever
// order they come.
func extendedReplies(r io.Reader, offsets map[uint64]uint64) (map[uint64][]chunk, error) {
	got := map[uint64][]chunk{}
	for range offsets {
		var h [32]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return got, err
		}
		cookie := binary.BigEndian.Uint64(h[8:])
		all, err := readExtended(io.MultiReader(bytes.NewReader(h[:]), r), cookie, offsets[cookie])
		if err != nil {
			return got, err
		}
		got[cookie] = all
	}
	return got, nil
}

// TestExtendedResume holds that a connection which is stopped in the middle of a payload goes on
// from there, with the same header.
func TestExtendedResume(t *testing.T) {
	v := make(boundless, 1)
	s := &server.Server{Exports: map[string]*server.Export{"x": export(t, v, server.Options{})}}
	ours, theirs := socketpair(t)
	defer ours.Close()
	defer theirs.Close()
	agreed := server.Agreement{Export: "x", Size: boundlessSize, BlockSize: 1, Structured: true, Extended: true}
	agreed.Flags = s.Exports["x"].Flags() | 1<<7
	session, err := s.Resume(theirs, agreed, nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- session.Conn().Transmit() }()
	stream := call{op: cmdWrite, flags: payloadLen, offset: 9, data: bytes.Repeat([]byte("w"), 300000)}.
		encodeExtended(4, 300000)
	first := append(call{op: cmdRead, offset: 5}.encodeExtended(3, 1), stream[:200000]...)
	ours.Write(first)
	if _, err := readExtended(ours, 3, 5); err != nil {
		t.Fatal(err)
	}
	if err := session.Conn().Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != server.ErrShutdown {
		t.Fatal(err)
	}
	unread := session.Conn().Unread()
	if !bytes.HasPrefix(stream, unread) {
		t.Fatalf("%d bytes are unread, which are not the beginning of the write", len(unread))
	}
	session, err = s.Resume(theirs, session.Agreement, unread)
	if err != nil {
		t.Fatal(err)
	}
	go func() { done <- session.Conn().Transmit() }()
	ours.Write(stream[200000:])
	got, err := readExtended(ours, 4, 9)
	if diff := cmp.Diff([]chunk{{chunkNone, ""}}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if asked := <-v; asked != "write w 9+300000" {
		t.Error(asked)
	}
	ours.Close()
	<-done

	agreed.Structured = false
	if _, err := s.Resume(theirs, agreed, nil); err == nil {
		t.Error("extended headers without structured replies were resumed")
	}
}

// TestDescription holds who is told what an export is, and what is no description ("NBD_OPT_LIST",
// "NBD_INFO_DESCRIPTION").
func TestDescription(t *testing.T) {
	s := &server.Server{Exports: map[string]*server.Export{
		"x": export(t, newDisk(8192), server.Options{Description: "a disk ☺"}),
		"y": export(t, newDisk(8192), server.Options{}),
	}}
	ask := func(name string, infos ...uint16) string {
		asked := option(optList, "") + option(optGo, infoData(name, infos...))
		c := &talker{in: strings.NewReader(clientFlags(3) + asked)}
		session, err := s.Handshake(c)
		if err != nil {
			t.Fatal(err)
		}
		session.Conn().Close()
		return c.out.String()
	}
	listed := greeting + optionReply(optList, repServer, "\x00\x00\x00\x01xa disk ☺") +
		optionReply(optList, repServer, "\x00\x00\x00\x01y") + optionReply(optList, repAck, "")
	of := optionReply(optGo, repInfo, "\x00\x00"+be64(8192)+flagsDefault)
	described := optionReply(optGo, repInfo, "\x00\x02a disk ☺")
	ack := optionReply(optGo, repAck, "")
	for name, tt := range map[string]struct{ got, want string }{
		"who asks":            {ask("x", 2), listed + of + described + ack},
		"who does not":        {ask("x"), listed + of + ack},
		"where there is none": {ask("y", 2), listed + of + ack},
	} {
		if diff := cmp.Diff(tt.want, tt.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if err := s.Exports["x"].SetDescription("two disks"); err != nil {
		t.Fatal(err)
	}
	if got := ask("x", 2); strings.Count(got, "two disks") != 2 || strings.Contains(got, "☺") {
		t.Errorf("of what is described anew the server says %q", got)
	}
	for _, wrong := range []string{"\xff", "a\x00b", strings.Repeat("x", 4097)} {
		if err := s.Exports["x"].SetDescription(wrong); err == nil {
			t.Errorf("a description %.10q is taken", wrong)
		}
		if _, err := server.NewExport(newDisk(8192), server.Options{Description: wrong}); err == nil {
			t.Errorf("%.10q is a description", wrong)
		}
	}
}

// TestNegotiateExtended holds what a client is answered that asks for extended headers
// ("NBD_OPT_EXTENDED_HEADERS").
func TestNegotiateExtended(t *testing.T) {
	const alloc = "base:allocation"
	extended, structured := option(optExtended, ""), option(optStructured, "")
	ack, ackStructured := optionReply(optExtended, repAck, ""), optionReply(optStructured, repAck, "")
	set := optionReply(optSetMeta, repMetaContext, "\x00\x00\x00\x01"+alloc) + optionReply(optSetMeta, repAck, "")
	contexts := []server.Context{{ID: 1, Name: alloc}}
	for _, tt := range []struct {
		name     string
		said     string // before NBD_OPT_GO
		answer   string
		compact  bool // headers, in the end
		contexts []server.Context
	}{
		{name: "alone", said: extended, answer: ack},
		{name: "twice", said: extended + extended, answer: ack + ack},
		{name: "after structured", said: structured + extended, answer: ackStructured + ack},
		{name: "before structured", said: extended + structured,
			answer: ack + optionReply(optStructured, errExtended, "extended headers were agreed on")},
		{name: "with data", said: structured + option(optExtended, "x"), compact: true,
			answer: ackStructured + optionReply(optExtended, errInvalid, "the option takes no data")},
		{name: "contexts", said: extended + option(optSetMeta, metaData("disk", alloc)), answer: ack + set,
			contexts: contexts},
		{name: "contexts before", said: structured + option(optSetMeta, metaData("disk", alloc)) + extended,
			answer: ackStructured + set + ack, contexts: contexts},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &talker{in: strings.NewReader(clientFlags(3) + tt.said + option(optGo, infoData("disk")))}
			s := &server.Server{Exports: exports(t)}
			session, err := s.Handshake(c)
			if err != nil {
				t.Fatal(err)
			}
			session.Conn().Close()
			flags := wire.Flags(0x183) // has-flags, read-only, DF, multi-conn
			if tt.contexts != nil {
				flags |= wire.FlagBlockStatusPayload
			}
			info := "\x00\x00" + sizeDisk + string(binary.BigEndian.AppendUint16(nil, uint16(flags)))
			want := greeting + tt.answer + optionReply(optGo, repInfo, info)
			if got := c.out.String(); !strings.HasPrefix(got, want) {
				t.Errorf("the server said (-want +got):\n%s", cmp.Diff(want, got))
			}
			agreed := server.Agreement{Export: "disk", Size: 8192, BlockSize: 512, Flags: flags,
				Structured: true, Extended: !tt.compact, Contexts: tt.contexts}
			if diff := cmp.Diff(agreed, session.Agreement); diff != "" {
				t.Errorf("agreed on (-want +got):\n%s", diff)
			}
		})
	}
	c := &talker{in: strings.NewReader(clientFlags(3) + extended + option(optExportName, "disk"))}
	s := &server.Server{Exports: exports(t)}
	if _, err := s.Handshake(c); err == nil || c.out.String() != greeting+ack {
		t.Errorf("NBD_OPT_EXPORT_NAME with extended headers: %v, %q", err, c.out.String())
	}
}
