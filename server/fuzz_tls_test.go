package server_test

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// FuzzStartTLS has a client say foreign bytes before NBD_OPT_STARTTLS, behind it, and within TLS.
// What lies behind it is never answered. Within TLS the server answers, and agrees, as if nothing
// had been said before. Where TLS is required, it tells nothing before that.
func FuzzStartTLS(f *testing.F) {
	set := option(optSetMeta, metaData("disk", "base:allocation"))
	goes := option(optGo, infoData("disk"))
	for _, required := range []bool{false, true} {
		f.Add("", "", goes, required)
		f.Add(option(optStructured, "")+set, "", set+goes, required)
		f.Add(option(optExtended, "")+set, "", option(optInfo, infoData("disk"))+option(optExportName, "disk"),
			required)
		f.Add(option(optList, "")+option(99, strings.Repeat("x", 9000)), "", startTLS+option(optList, ""), required)
		f.Add("", option(optList, "")+goes, "", required)
		f.Add("", "\x16\x03\x01\x40\x00\x01\x00", "", required)
		f.Add(startTLS, "", "", required)
		f.Add(option(optStartTLS, "data"), "", option(optAbort, ""), required)
		f.Add(goes, "", "", required)
		f.Add(option(optExportName, "disk"), "", "", required)
		f.Add(option(99, "0123456789abcdef")[:16], "", option(optList, ""), required)
	}
	a := certs.New(f)
	const patience = 10 * time.Second
	offers, requires := secureServer(f, a), secureServer(f, a)
	offers.MaxOptions, offers.HandshakeTimeout = 1<<20, patience
	requires.MaxOptions, requires.HandshakeTimeout, requires.RequireTLS = 1<<20, patience, true
	plain := &server.Server{Exports: offers.Exports, MaxOptions: 1 << 20}

	f.Fuzz(func(t *testing.T, before, behind, within string, required bool) {
		s := offers
		if required {
			s = requires
		}
		c := secretive{t: t, within: within, config: trusting(a)}
		c.said = before + startTLS + behind
		c.answer, c.begins = untilTLS(s, c.said)
		if required {
			tellsNothing(t, c.answer)
		}
		c.want, c.agrees = inPlainText(plain, within)

		ours, theirs := socketpair(t)
		ours.SetDeadline(time.Now().Add(patience))
		agreed := make(chan *server.Agreement, 1)
		go func() {
			defer theirs.Close()
			session, err := s.Handshake(theirs)
			if err != nil {
				agreed <- nil
				return
			}
			session.Conn().Close()
			agreed <- &session.Agreement
		}()
		secured := c.talk(ours)
		ours.Close()
		switch got := <-agreed; {
		case secured:
			if diff := cmp.Diff(c.agrees, got); diff != "" {
				t.Errorf("agreed on over TLS (-want +got):\n%s", diff)
			}
		case got != nil && (required || got.TLS):
			t.Errorf("agreed on without TLS: %+v", got)
		}
	})
}

// untilTLS returns what the server answers in plain text, and at which length of what is said TLS
// begins, or -1.
func untilTLS(s *server.Server, said string) (answer string, begins int) {
	ack := optionReply(optStartTLS, repAck, "")
	for from := 0; ; {
		i := strings.Index(said[from:], startTLS)
		if i < 0 {
			break
		}
		from += i + len(startTLS)
		if answer, _ := handshakeWith(s, said[:from]); strings.HasSuffix(answer, ack) {
			return answer, from
		}
		from -= len(startTLS) - 1
	}
	answer, _ = handshakeWith(s, said)
	return answer, -1
}

// inPlainText returns what is to be answered within TLS, and agreed on, or nil: what a server that
// has no TLS does, of which nobody has asked anything before.
func inPlainText(s *server.Server, said string) (string, *server.Agreement) {
	answer, agreed := handshakeWith(s, said)
	if agreed != nil {
		agreed.TLS = true
	}
	const policy = 1<<31 + 2
	return strings.ReplaceAll(strings.TrimPrefix(answer, greeting),
		optionReply(optStartTLS, policy, "this server has no TLS"),
		optionReply(optStartTLS, errInvalid, "TLS was begun before")), agreed
}

// handshakeWith returns what the server answers to a client that says nothing else, and what was
// agreed on, or nil.
func handshakeWith(s *server.Server, said string) (string, *server.Agreement) {
	c := &talker{in: strings.NewReader(clientFlags(3) + said)}
	session, err := s.Handshake(c)
	if err != nil {
		return c.out.String(), nil
	}
	session.Conn().Close()
	return c.out.String(), &session.Agreement
}

// tellsNothing holds that an answer in plain text is that TLS is required, but to NBD_OPT_STARTTLS
// and NBD_OPT_ABORT.
func tellsNothing(t *testing.T, answer string) {
	t.Helper()
	const tlsRequired = 1<<31 + 5
	for rest := strings.TrimPrefix(answer, greeting); rest != ""; {
		if len(rest) < 20 {
			t.Fatalf("%q is no reply", rest)
		}
		number := binary.BigEndian.Uint32([]byte(rest[8:]))
		n := 20 + int(binary.BigEndian.Uint32([]byte(rest[16:])))
		refused := rest[:n] == optionReply(number, tlsRequired, "TLS is required")
		if !refused && number != optStartTLS && number != optAbort {
			t.Errorf("option %d is answered by %q", number, rest[:n])
		}
		rest = rest[n:]
	}
}

// A secretive is a client that begins TLS.
type secretive struct {
	t      *testing.T
	config *tls.Config
	said   string // in plain text, with all that lies behind NBD_OPT_STARTTLS
	answer string // in plain text
	begins int    // what is said behind that is not heard, for TLS begins; -1: it does not
	within string // is said over TLS

	want   string            // what is answered to that
	agrees *server.Agreement // what comes of it
}

// talk talks with a server, and reports whether it came to TLS.
func (c *secretive) talk(ours *net.UnixConn) (secured bool) {
	said := make(chan struct{})
	go func() {
		defer close(said)
		io.WriteString(ours, clientFlags(3)+c.said)
		if c.begins < 0 {
			ours.CloseWrite()
		}
	}()
	defer func() { <-said }()
	if got := c.read(ours, len(c.answer)); got != c.answer {
		c.t.Fatalf("the answer in plain text is %q, want %q", got, c.answer)
	}
	if c.begins < 0 {
		if rest := c.read(ours, 1<<20); rest != "" {
			c.t.Errorf("in plain text the server says also %q", rest)
		}
		return false
	}
	<-said
	wire := &recorder{Conn: ours}
	behind := c.said[c.begins:]
	if behind != "" && (behind[0] == 0x15 || behind[0] == 0x16) {
		ours.CloseWrite() // This may be the beginning of a record that the server waits for.
		c.read(wire, 1<<20)
	} else {
		secured = c.secure(wire, behind == "")
	}
	if strings.Contains(wire.heard.String(), "\x00\x03\xe8\x89\x04\x55\x65\xa9") {
		c.t.Errorf("behind NBD_OPT_STARTTLS an option is answered in plain text: %q", wire.heard.String())
	}
	return secured
}

// secure talks over TLS, and reports whether it came to that.
func (c *secretive) secure(wire *recorder, must bool) bool {
	over := tls.Client(wire, c.config)
	if err := over.Handshake(); err != nil {
		if must || errors.Is(err, os.ErrDeadlineExceeded) {
			c.t.Errorf("TLS: %v", err)
		}
		return false
	}
	said := make(chan struct{})
	go func() {
		defer close(said)
		io.WriteString(over, c.within)
		over.CloseWrite()
		wire.Conn.(*net.UnixConn).CloseWrite()
	}()
	if got := c.read(over, 1<<20); got != c.want {
		c.t.Errorf("over TLS the answer is %q, want %q", got, c.want)
	}
	<-said
	return true
}

// read reads n bytes, or all there are.
func (c *secretive) read(nc io.Reader, n int) string {
	c.t.Helper()
	b, err := io.ReadAll(io.LimitReader(nc, int64(n)))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("the server hangs, and has said %q", b)
	}
	return string(b)
}

// A recorder keeps what was received.
type recorder struct {
	net.Conn
	heard strings.Builder
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.heard.Write(p[:n])
	return n, err
}
