package server_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// negotiated returns both ends of a connection whose client has chosen an export.
func negotiated(t *testing.T, s *server.Server, name string) (ours net.Conn, session *server.Session) {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go io.WriteString(ours, clientFlags(3)+option(optGo, infoData(name)))
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		io.CopyN(io.Discard, ours, int64(len(greeting)))
		for b := [20]byte{}; binary.BigEndian.Uint32(b[12:]) != repAck; {
			if _, err := io.ReadFull(ours, b[:]); err != nil {
				return
			}
			io.CopyN(io.Discard, ours, int64(binary.BigEndian.Uint32(b[16:])))
		}
	}()
	session, err := s.Handshake(theirs)
	if err != nil {
		t.Fatal(err)
	}
	<-heard
	return ours, session
}

// TestSessionWrittenDown holds that a connection goes on where another server, which knows no more
// than what was written down, takes it over in the middle of a request.
func TestSessionWrittenDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newDisk(1 << 20)
		old := &server.Server{Exports: map[string]*server.Export{"x": export(t, disk, server.Options{BlockSize: 512})}}
		ours, theirs := net.Pipe()
		defer ours.Close()
		go func() {
			io.WriteString(ours, clientFlags(3)+option(optExportName, "x"))
			ours.Write(call{op: cmdWrite, data: bytes.Repeat([]byte{7}, 512)}.encode(1)[:100])
		}()
		go io.CopyN(io.Discard, ours, int64(len(greeting)+10))
		session, err := old.Handshake(theirs)
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error)
		go func() { result <- session.Conn().Transmit() }()
		synctest.Wait()
		if err := session.Conn().Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-result; err != server.ErrShutdown {
			t.Errorf("Transmit: %v", err)
		}
		unread := session.Conn().Unread()
		if len(unread) != 100 {
			t.Errorf("%d bytes unread, want 100", len(unread))
		}
		written, err := json.Marshal(session.Agreement)
		if err != nil {
			t.Fatal(err)
		}
		if want := `{"export":"x","size":1048576,"block_size":512,"flags":2413}`; string(written) != want {
			t.Errorf("written down: %s, want %s", written, want)
		}

		var agreed server.Agreement
		if err := json.Unmarshal(written, &agreed); err != nil {
			t.Fatal(err)
		}
		next := &server.Server{Exports: map[string]*server.Export{"x": export(t, disk, server.Options{BlockSize: 512})}}
		resumed, err := next.Resume(theirs, agreed, unread)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(agreed, resumed.Agreement); diff != "" || resumed.Export() != next.Exports["x"] {
			t.Errorf("resumed with export %p and (-want +got):\n%s", resumed.Export(), diff)
		}
		go func() { result <- resumed.Conn().Transmit() }()
		go ours.Write(call{op: cmdWrite, data: bytes.Repeat([]byte{7}, 512)}.encode(1)[100:])
		if p, err := readReply(ours, func(uint64) int { return 0 }); err != nil || p.errno != 0 || p.cookie != 1 {
			t.Errorf("reply %+v, error %v", p, err)
		}
		got := make([]byte, 513)
		disk.ReadAt(got, 0)
		if !bytes.Equal(got, append(bytes.Repeat([]byte{7}, 512), 0)) {
			t.Error("the write that was taken over has not arrived whole")
		}
		go io.Copy(io.Discard, ours)
		ours.Write(call{op: cmdDisc}.encode(2))
		if err := <-result; err != nil {
			t.Errorf("Transmit: %v", err)
		}
	})
}

// TestSessionNotKept holds that nobody goes on with an export that is another by now.
func TestSessionNotKept(t *testing.T) {
	s := &server.Server{Exports: map[string]*server.Export{"x": export(t, newDisk(8192),
		server.Options{BlockSize: 512})}}
	_, session := negotiated(t, s, "x")
	agreed := session.Agreement
	for name, tt := range map[string]struct {
		change func(a *server.Agreement)
		says   string // nothing: it is fine
	}{
		"the same": {func(a *server.Agreement) {}, ""},
		"grown":    {func(a *server.Agreement) { a.Size -= 512 }, ""},
		"shrunk":   {func(a *server.Agreement) { a.Size += 512 }, "its size is 8192 bytes, and 8704 were agreed"},
		"flags": {func(a *server.Agreement) { a.Flags |= 2 },
			"its flags are has-flags,flush,fua,trim,write-zeroes,multi-conn,fast-zero, and has-flags,read-only"},
		"flags since": {func(a *server.Agreement) { a.Flags &^= wire.FlagSendFastZero }, ""},
		"blocks": {func(a *server.Agreement) { a.BlockSize = 1 },
			"its block size is 512 bytes, and 1 were agreed"},
		"gone": {func(a *server.Agreement) { a.Export = "y" }, `no export "y"`},
	} {
		ours, theirs := net.Pipe()
		a := agreed
		tt.change(&a)
		resumed, err := s.Resume(theirs, a, nil)
		if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("%s: error %v, want %q", name, err, tt.says)
		}
		if err == nil {
			resumed.Conn().Close()
		}
		ours.Close()
	}
}

// TestSessionLimits holds that connections which are not accepted by the server are within its
// limits.
func TestSessionLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server.Server{Exports: exports(t), MaxConnections: 2, HandshakeTimeout: time.Minute}
		_, first := negotiated(t, s, "")
		_, second := negotiated(t, s, "")
		result := make(chan error)
		go func() { result <- second.Conn().Transmit() }()

		ours, theirs := net.Pipe()
		start := time.Now()
		if _, err := s.Handshake(theirs); err == nil || !strings.Contains(err.Error(), "2 clients are being served") {
			t.Errorf("a third one: %v", err)
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("a third one was refused after %v", took)
		}
		ours.Close()

		go func() {
			time.Sleep(time.Second)
			first.Conn().Close() // without ever being served
		}()
		ours, third := negotiated(t, s, "")
		c := newClient(t, ours)
		go func() { result <- third.Conn().Transmit() }()
		c.expect(0, call{op: cmdRead, length: 512})

		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := <-result; err != server.ErrShutdown {
				t.Errorf("Transmit: %v", err)
			}
		}
		if _, err := s.Handshake(theirs); err != server.ErrServerClosed {
			t.Errorf("after Shutdown: %v", err)
		}
		if _, err := s.Resume(theirs, third.Agreement, nil); err != server.ErrServerClosed {
			t.Errorf("after Shutdown: %v", err)
		}
		if err := first.Conn().Transmit(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("what was closed before: %v", err)
		}
	})
}

// TestLookup holds that exports which are made on demand are served like others, not listed unless
// List has them, and given back once for each time that they were asked for.
func TestLookup(t *testing.T) {
	made := export(t, newDisk(4096), server.Options{})
	var asked []string
	out := 0
	s := &server.Server{Exports: exports(t), Lookup: func(name string) (*server.Export, func()) {
		asked = append(asked, name)
		if name == "made" {
			out++
			return made, func() { out-- }
		}
		return nil, nil
	}}
	lookUp := option(optList, "") + option(optGo, infoData("no")) + option(optInfo, infoData("made")) +
		option(optStructured, "") + option(optSetMeta, metaData("made", "base:allocation"))
	info := func(o uint32) string {
		return optionReply(o, repInfo, "\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00"+flagsDefault) +
			optionReply(o, repAck, "")
	}
	ack := optionReply(optStructured, repAck, "") +
		optionReply(optSetMeta, repMetaContext, "\x00\x00\x00\x01base:allocation") + optionReply(optSetMeta, repAck, "")
	c := &talker{in: strings.NewReader(clientFlags(3) + lookUp + option(optAbort, ""))}
	if e, err := chosen(s, c); e != nil || err != server.ErrAborted || out != 0 {
		t.Errorf("export %p, error %v, and %d are out", e, err, out)
	}
	want := greeting + optionReply(optList, repServer, "\x00\x00\x00\x00") +
		optionReply(optList, repServer, "\x00\x00\x00\x04disk") +
		optionReply(optList, repAck, "") + optionReply(optGo, errUnknown, "no such export") +
		info(optInfo) + ack + optionReply(optAbort, repAck, "")
	if diff := cmp.Diff(want, c.out.String()); diff != "" {
		t.Errorf("the server said (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"no", "made", "made"}, asked); diff != "" {
		t.Errorf("looked up (-want +got):\n%s", diff)
	}

	// The connection has it until it has ended.
	s.List = func(yield func(name, description string) bool) { _ = yield("made", "to order") && yield("z", "") }
	c = &talker{in: strings.NewReader(clientFlags(3) + option(optList, "") + option(optGo, infoData("made")))}
	session, err := s.Handshake(c)
	if err != nil || session.Export() != made || out != 1 {
		t.Fatalf("%v, and %d are out", err, out)
	}
	want = greeting + optionReply(optList, repServer, "\x00\x00\x00\x04madeto order") +
		optionReply(optList, repServer, "\x00\x00\x00\x01z") + optionReply(optList, repAck, "") + info(optGo)
	if diff := cmp.Diff(want, c.out.String()); diff != "" {
		t.Errorf("the server said (-want +got):\n%s", diff)
	}
	agreed := session.Agreement
	session.Conn().Close()
	if out != 0 {
		t.Errorf("when the connection has ended %d are out", out)
	}

	// So it is where a session does not come about.
	agreed.Size++
	if _, err := s.Resume(c, agreed, nil); err == nil || out != 0 {
		t.Errorf("%v, and %d are out", err, out)
	}
	agreed.Size--
	s.Close()
	if _, err := s.Resume(c, agreed, nil); err != server.ErrServerClosed || out != 0 {
		t.Errorf("%v, and %d are out", err, out)
	}
	c = &talker{in: strings.NewReader(clientFlags(3) + option(optGo, infoData("made")))}
	if _, err := s.Handshake(c); err != server.ErrServerClosed || out != 0 {
		t.Errorf("%v, and %d are out", err, out)
	}
}

// TestMaxOptions holds that a client which goes on negotiating for ever does not.
func TestMaxOptions(t *testing.T) {
	s := &server.Server{Exports: exports(t), MaxOptions: 3}
	said := clientFlags(3) + strings.Repeat(option(99, ""), 2)
	if e, err := chosen(s, &talker{in: strings.NewReader(said + option(optGo, infoData("")))}); e == nil || err != nil {
		t.Errorf("within the bound: %v", err)
	}
	c := &talker{in: strings.NewReader(said + option(99, "") + option(optGo, infoData("")))}
	if _, err := chosen(s, c); err == nil || !strings.Contains(err.Error(), "3 options") {
		t.Errorf("beyond it: %v", err)
	}
}
