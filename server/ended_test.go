package server_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestConnectionRecord holds what the log tells of a client that had an export.
func TestConnectionRecord(t *testing.T) {
	a := certs.New(t)
	const plain = "simple requests=3 errors=1 read=512 written=1024"
	for _, tt := range []struct {
		name string
		end  func(s *server.Server, c *client)
		over *tls.Config // nil: plain text
		want string
	}{
		{"goodbye", func(_ *server.Server, c *client) { c.start(call{op: cmdDisc}) }, nil,
			"INFO connection ended: " + plain + " by=client"},
		{"hung up", func(_ *server.Server, c *client) { c.nc.Close() }, nil,
			"INFO connection ended: " + plain + " by=client, without NBD_CMD_DISC"},
		{"shut down", func(s *server.Server, _ *client) { go s.Shutdown(context.Background()) }, nil,
			"INFO connection ended: " + plain + " by=server"},
		{"cut", func(_ *server.Server, c *client) { c.nc.Write([]byte("\x25\x60")); c.nc.Close() }, nil,
			"WARN connection failed: " + plain + " err=server: receive request: unexpected EOF"},
		{"TLS", func(_ *server.Server, c *client) { c.start(call{op: cmdDisc}) },
			&tls.Config{RootCAs: a.Pool, ServerName: "localhost", Certificates: []tls.Certificate{a.Client}},
			"INFO connection ended: TLS 1.3 CN=nbdctl test client " + plain + " by=client"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logBuffer
				s := secureServer(t, a)
				s.Logger = slog.New(log.handler())
				s.TLS.ClientAuth, s.TLS.ClientCAs = tls.VerifyClientCertIfGiven, a.Pool
				s.Exports["x"] = export(t, newDisk(8192), server.Options{})
				d := serve(t, s)
				var nc net.Conn
				if tt.over == nil {
					nc = d.dial(t, "x")
				} else {
					nc = secured(t, d.dial(t, "-"), tt.over, "", "")
					converse(t, nc, option(optExportName, "x"), "0123456789")
				}
				c := newClient(t, nc)
				c.expect(0, call{op: cmdRead, length: 512})
				c.expect(0, call{op: cmdWrite, data: make([]byte, 1024)})
				c.expect(einval, call{op: cmdRead, offset: 8192, length: 1})
				synctest.Wait() // The server has seen that its last reply was taken.
				tt.end(s, c)
				io.Copy(io.Discard, nc)
				synctest.Wait()
				if got := ended(t, log.buf.String()); got != tt.want {
					t.Errorf("the log tells\n%s, want\n%s", got, tt.want)
				}
			})
		})
	}
}

// ended sums up the record of a connection to export x.
func ended(t *testing.T, log string) string {
	t.Helper()
	var r struct {
		Level, Msg, Client, TLS, Identity, Export, Replies, By, Err string
		Requests, Errors, Read, Written                             json.Number
	}
	if err := json.Unmarshal([]byte(log), &r); err != nil {
		t.Fatalf("%v: %s", err, log)
	}
	if diff := cmp.Diff("x", r.Export); diff != "" || r.Client == "" {
		t.Errorf("client %q, export (-want +got):\n%s", r.Client, diff)
	}
	parts := []string{r.Level, r.Msg + ":"}
	for _, p := range []string{
		r.TLS, r.Identity, r.Replies, "requests=" + string(r.Requests), "errors=" + string(r.Errors),
		"read=" + string(r.Read), "written=" + string(r.Written),
	} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if r.By != "" {
		parts = append(parts, "by="+r.By)
	}
	if r.Err != "" {
		parts = append(parts, "err="+r.Err)
	}
	return strings.Join(parts, " ")
}
