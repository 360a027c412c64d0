package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestKernelUpgradeRemote upgrades devices of other servers again and again while they are
// written and verified. A server notices nothing, but over TLS, and its end and return are
// survived as ever.
func TestKernelUpgradeRemote(t *testing.T) {
	for _, tt := range []struct {
		name   string
		listen string // of the server; "": a Unix socket
		tls    bool
		flags  []string
	}{
		{"relay, two connections", "tcp:127.0.0.1:0", false, []string{"-o", "way=relay", "--connections", "2"}},
		{"relay over TLS", "tcp:127.0.0.1:0", true, nil},
		{"direct, two connections", "", false, []string{"-o", "way=direct", "--connections", "2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requireKernel(t, awayNoise)
			nbdnltest.Waking.Need(t)
			dir := shortDir(t)
			image := filepath.Join(dir, "disk.img")
			sh(t, "truncate -s 64M "+image)
			listen := tt.listen
			if listen == "" {
				listen = "unix:" + filepath.Join(dir, "s")
			}
			args := []string{"file", image, "--listen", listen}
			if tt.tls {
				certs.New(t).Write(t, dir)
				args = append(args, "--tls-certificates", dir)
			}
			server := farServer(t, args...)
			uri := server.uri
			address, _, _ := strings.Cut(strings.TrimLeft(uri, "nbds:/"), "/")
			for i := range args { // It is to be found at the same address again.
				if strings.HasPrefix(args[i], "tcp:") {
					args[i] = "tcp:" + address
				}
			}
			if tt.tls {
				uri = strings.Replace(uri, "127.0.0.1", "localhost", 1) + "?tls-certificates=" + dir
			}
			dev := connected(t, append([]string{uri, "--name", "upgraded", "--timeout", "5s"}, tt.flags...)...)
			upgradedUnderLoad(t, dev, onExt4, func() {
				if ended := strings.Count(server.log.String(), "connection ended"); (ended > 0) != tt.tls {
					t.Errorf("%d connections to the server have ended:\n%s", ended, server.log)
				}
				// The new process sees to lost connections.
				before := remoteOf(t, dev)["replaced"].(float64)
				server.kill()
				server.start()
				eventually(t, func() bool {
					r := remoteOf(t, dev)
					return r["replaced"].(float64) > before && r["connections_alive"] == r["connections"]
				}, "the connections to the server")
			})
		})
	}
}

// TestKernelUpgradeAway upgrades a device whose server is away: what waits for that waits on, and
// is served when the server is back.
func TestKernelUpgradeAway(t *testing.T) {
	for _, way := range []string{"relay", "direct"} {
		t.Run(way, func(t *testing.T) {
			requireKernel(t, awayNoise)
			nbdnltest.Waking.Need(t)
			dir := shortDir(t)
			args := []string{"memory", "--size", "1M", "--listen", "unix:" + filepath.Join(dir, "s")}
			server := farServer(t, args...)
			dev := connected(t, server.uri, "-o", "way="+way, "--timeout", "4s")
			server.kill()
			eventually(t, func() bool { return remoteOf(t, dev)["lost_since"] != nil }, "the loss")
			since, err := time.Parse(time.RFC3339, remoteOf(t, dev)["lost_since"].(string))
			if err != nil {
				t.Fatal(err)
			}
			must(t, "upgrade", dev)
			now, err := time.Parse(time.RFC3339, remoteOf(t, dev)["lost_since"].(string))
			if err != nil || now.Sub(since).Abs() > time.Second {
				t.Errorf("it is lost since %v, and was since %v: %v", now, since, err)
			}
			reading := begin(t, command(t, "dd", "if="+dev, "of=/dev/null", "bs=64k", "iflag=direct"))
			server.start()
			if r := <-reading; r.code != 0 {
				t.Errorf("dd: %d, %s", r.code, r.stderr)
			}
			must(t, "upgrade", dev)
			must(t, "disconnect", dev)
		})
	}
}
