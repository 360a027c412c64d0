package server_test

import (
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// TestKnocks holds what the log tells of clients that come and go: of those that say nothing
// nothing, and of the others no more than it tells of requests.
func TestKnocks(t *testing.T) {
	const clients, period = 50, 10 * time.Second
	silent := func(c net.Conn) { c.Close() }
	greeted := func(c net.Conn) {
		io.ReadFull(c, make([]byte, len(greeting)))
		c.Close()
	}
	babbling := func(c net.Conn) {
		io.ReadFull(c, make([]byte, len(greeting)))
		io.WriteString(c, "GET / HTTP/1.1\r\n")
		c.Close()
	}
	mute := func(net.Conn) {} // until the server has had enough
	for _, tt := range []struct {
		name, export string
		visit        func(net.Conn)
		message      string
		which        string
	}{
		{"at once", "-", silent, "", ""},
		{"after the greeting", "-", greeted, "", ""},
		{"another protocol", "-", babbling, "handshake failed", "handshake"},
		{"mute", "-", mute, "handshake failed", "handshake"},
		{"in the middle of a request", "", func(c net.Conn) { io.WriteString(c, "\x25\x60\x95\x13"); c.Close() },
			"connection failed", "connection"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logBuffer
				e, err := server.NewExport(newDisk(1<<20), server.Options{})
				if err != nil {
					t.Fatal(err)
				}
				s := &server.Server{Exports: map[string]*server.Export{"": e}, Logger: slog.New(log.handler()),
					HandshakeTimeout: period / 2}
				d := serve(t, s)
				for range clients {
					tt.visit(d.dial(t, tt.export))
				}
				time.Sleep(period / 2) // which passes when all that can be done is done
				synctest.Wait()
				at := log.records(t)
				time.Sleep(2 * period)
				synctest.Wait()
				later := log.records(t)
				if tt.message == "" {
					if len(at)+len(later) > 0 {
						t.Errorf("the log tells %v, %v", at, later)
					}
					return
				}
				if len(at) != 10 || at[0].Msg != tt.message || at[0].Level != "WARN" || at[0].Err == "" {
					t.Errorf("the log tells %d of %d clients: %v", len(at), clients, at)
				}
				if len(later) != 1 || later[0].Msg != "more clients than are logged" || later[0].More != clients-10 ||
					later[0].Which != tt.which {
					t.Errorf("of the others it tells %v", later)
				}
			})
		})
	}
}
