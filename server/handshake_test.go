package server_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

// Numbers of the protocol document, written out again.
const (
	optExportName, optAbort, optList, optStartTLS, optInfo, optGo, optStructured = 1, 2, 3, 5, 6, 7, 8

	repAck, repServer, repInfo = 1, 2, 3

	errUnsup, errInvalid, errUnknown, errTooBig = 1<<31 + 1, 1<<31 + 3, 1<<31 + 6, 1<<31 + 9

	greeting = "NBDMAGICIHAVEOPT\x00\x03"
)

// option encodes one option.
func option(number uint32, data string) string {
	b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), number)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return string(b) + data
}

// infoData encodes the data of NBD_OPT_INFO and NBD_OPT_GO.
func infoData(name string, asks ...uint16) string {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(asks)))
	for _, a := range asks {
		b = binary.BigEndian.AppendUint16(b, a)
	}
	return string(b)
}

// optionReply encodes what the server is to answer.
func optionReply(number, code uint32, data string) string {
	b := binary.BigEndian.AppendUint64(nil, 0x0003e889045565a9)
	b = binary.BigEndian.AppendUint32(b, number)
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return string(b) + data
}

// clientFlags are the four bytes that a client says first.
func clientFlags(f byte) string { return "\x00\x00\x00" + string(rune(f)) }

// A talker is a net.Conn whose client has said all it will say.
type talker struct {
	net.Conn
	in  *strings.Reader
	out bytes.Buffer
}

func (c *talker) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *talker) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *talker) SetDeadline(time.Time) error { return nil }
func (c *talker) Close() error                { return nil }
func (c *talker) RemoteAddr() net.Addr        { return &net.UnixAddr{} }

func exports(t testing.TB) map[string]*server.Export {
	return map[string]*server.Export{
		"":     export(t, newDisk(1<<20), server.Options{}),
		"disk": export(t, newDisk(8192), server.Options{BlockSize: 512, ReadOnly: true}),
	}
}

// chosen negotiates, and returns the export that the client has chosen.
func chosen(s *server.Server, nc net.Conn) (*server.Export, error) {
	session, err := s.Handshake(nc)
	if err != nil {
		return nil, err
	}
	session.Conn().Close()
	return session.Export(), nil
}

const (
	sizeDefault  = "\x00\x00\x00\x00\x00\x10\x00\x00"
	flagsDefault = "\x09\x6d" // has-flags, flush, FUA, trim, write-zeroes, multi-conn, fast-zero
	sizeDisk     = "\x00\x00\x00\x00\x00\x00\x20\x00"
	flagsDisk    = "\x01\x03" // has-flags, read-only, multi-conn
)

func TestHandshake(t *testing.T) {
	const fixed = 3
	infoDefault := "\x00\x00" + sizeDefault + flagsDefault
	goDefault := optionReply(optGo, repInfo, infoDefault) + optionReply(optGo, repAck, "")
	tests := []struct {
		name   string
		said   string
		answer string // behind the greeting
		export string // "-": none
		err    string // in the error; empty: none
		left   int    // bytes not read
	}{
		{name: "go", said: clientFlags(fixed) + option(optGo, infoData("")), answer: goDefault},
		{name: "go, requests behind it", said: clientFlags(fixed) + option(optGo, infoData("")) + "request",
			answer: goDefault, left: 7},
		{name: "abort", said: clientFlags(fixed) + option(optAbort, ""), answer: optionReply(optAbort, repAck, ""),
			export: "-", err: server.ErrAborted.Error()},
		{name: "by name", said: clientFlags(fixed) + option(optExportName, "disk"), answer: sizeDisk + flagsDisk,
			export: "disk"},
		{name: "by an unknown name", said: clientFlags(fixed) + option(optExportName, "no"), export: "-",
			err: `no export "no"`},
		{name: "by a name far too long", said: clientFlags(fixed) + option(optExportName, strings.Repeat("x", 9000)),
			export: "-", err: "9000 bytes", left: 9000},
		{name: "replies not understood", said: clientFlags(2) + option(optGo, infoData("")), export: "-",
			err: "understands no replies", left: len(infoData(""))},
		{name: "unknown flags", said: "\x80\x00\x00\x03", export: "-", err: "not offered"},
		{name: "wrong magic", said: clientFlags(fixed) + "IHAVEOPS\x00\x00\x00\x07\x00\x00\x00\x00", export: "-",
			err: "out of step"},
		{name: "nothing", export: "-", err: "the client has said nothing: EOF"},
		{name: "half an option", said: clientFlags(fixed) + "IHAVE", export: "-", err: "option: unexpected EOF"},
		{name: "half of the data", said: clientFlags(fixed) + option(optGo, infoData("disk"))[:20], export: "-",
			err: "data of option 7: unexpected EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &server.Server{Exports: exports(t)}
			c := &talker{in: strings.NewReader(tt.said)}
			e, err := chosen(s, c)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if e != s.Exports[tt.export] {
				t.Errorf("export %p, want that named %q", e, tt.export)
			}
			if diff := cmp.Diff(greeting+tt.answer, c.out.String()); diff != "" {
				t.Errorf("the server said (-want +got):\n%s", diff)
			}
			if c.in.Len() != tt.left {
				t.Errorf("%d bytes were left to be read, want %d", c.in.Len(), tt.left)
			}
		})
	}
}

func TestHandshakeList(t *testing.T) {
	s := &server.Server{Exports: map[string]*server.Export{}}
	for i := range 5000 { // more than is answered at once
		s.Exports[fmt.Sprintf("disk-%d", i)] = nil
	}
	var want []string // in the order of the names
	for _, name := range slices.Sorted(maps.Keys(s.Exports)) {
		want = append(want, optionReply(optList, repServer,
			string(binary.BigEndian.AppendUint32(nil, uint32(len(name))))+name))
	}
	c := &talker{in: strings.NewReader(clientFlags(3) + option(optList, "") + option(optAbort, ""))}
	if _, err := s.Handshake(c); err != server.ErrAborted {
		t.Fatal(err)
	}
	got := c.out.String()[len(greeting):]
	end := optionReply(optList, repAck, "") + optionReply(optAbort, repAck, "")
	if !strings.HasSuffix(got, end) {
		t.Fatalf("the list does not end as it should")
	}
	var names []string
	for got = strings.TrimSuffix(got, end); len(got) >= 20; {
		n := 20 + int(binary.BigEndian.Uint32([]byte(got[16:])))
		names = append(names, got[:n])
		got = got[n:]
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// TestHandshakeTimeout has clients that say nothing, or one byte a second: neither holds the server
// up for longer than was set.
func TestHandshakeTimeout(t *testing.T) {
	for _, every := range []time.Duration{time.Hour, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			go io.Copy(io.Discard, ours)
			over := make(chan struct{})
			go func() {
				for _, b := range []byte(clientFlags(3) + option(99, strings.Repeat("x", 1000))) {
					select {
					case <-time.After(every):
						ours.Write([]byte{b})
					case <-over:
						return
					}
				}
			}()
			start := time.Now()
			_, err := (&server.Server{HandshakeTimeout: time.Minute}).Handshake(theirs)
			if e := net.Error(nil); !errors.As(err, &e) || !e.Timeout() {
				t.Errorf("error %v, want a timeout", err)
			}
			if took := time.Since(start); took != time.Minute {
				t.Errorf("it took %v", took)
			}
			close(over)
			ours.Close()
		})
	}
}

// FuzzHandshake has a client say foreign bytes. The server must stay in step: it answers every
// whole option exactly once, in order, and takes nothing that lies behind the one that ends the
// negotiation.
func FuzzHandshake(f *testing.F) {
	f.Add(clientFlags(3) + option(optGo, infoData("disk", 3)))
	f.Add(clientFlags(3) + option(optList, "") + option(99, "data") + option(optInfo, infoData("")) +
		option(optAbort, ""))
	f.Add(clientFlags(1) + option(optExportName, "disk") + "more")
	f.Add(clientFlags(3) + option(optGo, infoData("", 1, 2, 3))[:25])
	f.Add(clientFlags(3) + option(77, strings.Repeat("x", 9000)) + option(optGo, infoData("")))
	s := &server.Server{Exports: exports(f)}
	f.Fuzz(func(t *testing.T, said string) {
		c := &talker{in: strings.NewReader(said)}
		e, err := chosen(s, c)
		if (e == nil) == (err == nil) {
			t.Fatalf("export %p and error %v", e, err)
		}
		taken := said[:len(said)-c.in.Len()]
		answered := replied(t, c.out.String())
		var want []uint32
		last := uint32(0)
		for rest := strings.TrimPrefix(taken, taken[:min(4, len(taken))]); len(rest) >= 16; {
			last = binary.BigEndian.Uint32([]byte(rest[8:]))
			n := uint64(binary.BigEndian.Uint32([]byte(rest[12:])))
			if uint64(len(rest)-16) < n || rest[:8] != "IHAVEOPT" {
				break
			}
			if last != optExportName {
				want = append(want, last)
			}
			rest = rest[16+n:]
		}
		if e != nil && last != optExportName && last != optGo {
			t.Errorf("option %d has led to an export", last)
		}
		if err == nil || errors.Is(err, server.ErrAborted) || errors.Is(err, io.EOF) ||
			errors.Is(err, io.ErrUnexpectedEOF) {
			if !slices.Equal(answered, want) {
				t.Errorf("options %d were asked, %d answered", want, answered)
			}
		}
	})
}

// replied returns the options that were answered in full, checking that the stream is made of
// nothing but replies.
func replied(t *testing.T, said string) (options []uint32) {
	said, ok := strings.CutPrefix(said, greeting)
	if !ok {
		t.Fatal("no greeting")
	}
	for len(said) >= 20 && binary.BigEndian.Uint64([]byte(said)) == 0x0003e889045565a9 {
		code := binary.BigEndian.Uint32([]byte(said[12:]))
		if code == repAck || code >= 1<<31 {
			options = append(options, binary.BigEndian.Uint32([]byte(said[8:])))
		}
		said = said[20+binary.BigEndian.Uint32([]byte(said[16:])):]
	}
	// NBD_OPT_EXPORT_NAME is answered by what is no reply.
	if len(said) != 0 && len(said) != 10 && len(said) != 134 {
		t.Fatalf("%d bytes at the end are no reply", len(said))
	}
	return options
}
