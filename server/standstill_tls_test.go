package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// secureClientOf connects to a listener, and chooses an export over TLS.
func secureClientOf(t *testing.T, l net.Listener, config *tls.Config, name string) *tls.Conn {
	t.Helper()
	nc := secured(t, dialTo(t, l), config, "", "")
	converse(t, nc, option(optExportName, name), "0123456789")
	return nc
}

// A tailed connection keeps what was read last.
type tailed struct {
	net.Conn
	last []byte
}

func (c *tailed) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.last = append(c.last, p[:n]...)
	c.last = c.last[max(0, len(c.last)-31):]
	return n, err
}

// notified reports whether what was read ends with a record that can be an alert. TLS of package
// crypto takes the end of the stream for one.
func (c *tailed) notified() bool {
	return bytes.HasPrefix(c.last, []byte("\x15\x03\x03\x00\x1a")) || // TLS 1.2, by AES in GCM
		bytes.HasPrefix(c.last[7:], []byte("\x17\x03\x03\x00\x13")) // TLS 1.3
}

// TestHoldTLS has a server leave clients over TLS that send without an end, and take nothing for a
// while: they get a reply to each request that was executed, then the end, and connect to the other
// server.
func TestHoldTLS(t *testing.T) {
	a := certs.New(t)
	for _, way := range []string{"Leave", "Shutdown", "Shutdown in a hold"} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(way+", "+tls.VersionName(version), func(t *testing.T) { testHoldTLS(t, a, way, version) })
		}
	}
}

func testHoldTLS(t *testing.T, a *certs.Authority, way string, version uint16) {
	p := newPair(t)
	entered, release := make(chan struct{}), make(chan struct{})
	p.disk.before = func(op string, off, _ int64) error {
		if op == "read" && off == 0 {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	p.old.TLS = &tls.Config{Certificates: []tls.Certificate{a.Server}}
	p.next.TLS = p.old.TLS
	l := listenOn(t, "tcp")
	copied := copyOf(t, l)
	serving := serveOn(t, p.old, l)
	config := trusting(a)
	config.MinVersion, config.MaxVersion = version, version
	config.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256} // of TLS 1.2
	raw := &tailed{Conn: dialTo(t, l)}
	nc := secured(t, raw, config, "", "")
	converse(t, nc, option(optExportName, "x"), "0123456789")
	const reads, length = 3, 256 << 10
	for i := range reads {
		nc.Write(call{op: cmdRead, length: length}.encode(uint64(i)))
	}
	for range reads {
		<-entered
	}
	poured := make(chan struct{})
	go func() {
		defer close(poured)
		for cookie := uint64(reads); ; cookie++ {
			q := call{op: cmdWrite, offset: 4096, data: make([]byte, 16<<10)}
			if _, err := nc.Write(q.encode(cookie)); err != nil {
				return
			}
		}
	}()
	done := make(chan error)
	go func() {
		if way != "Shutdown" {
			h, err := p.old.Hold(t.Context())
			if err != nil {
				done <- err
				return
			}
			if n := len(h.Sessions()); n > 0 {
				t.Errorf("%d clients go along", n)
			}
			if way == "Leave" {
				h.Leave()
			}
		}
		done <- p.old.Shutdown(t.Context())
	}()
	close(release)
	<-time.After(50 * time.Millisecond) // What comes late has to wait for the client.

	replies := 0
	for {
		r, err := readReply(nc, func(cookie uint64) int {
			if cookie < reads {
				return length
			}
			return 0
		})
		if err != nil {
			if err != io.EOF || !raw.notified() {
				t.Errorf("the connection ended with %v, and before it %x", err, raw.last)
			}
			break
		}
		if r.errno != 0 {
			t.Errorf("request %d: error %d", r.cookie, r.errno)
		}
		replies++
	}
	nc.Close()
	<-poured
	if err := <-done; err != nil {
		t.Error(err)
	}
	checkError(t, <-serving, server.ErrServerClosed)
	if n := len(p.disk.history()); replies != n {
		t.Errorf("%d replies to %d requests", replies, n)
	}
	if out := <-p.out; out != 0 {
		t.Errorf("%d exports are out", out)
	}
	serveOn(t, p.next, copied)
	p.disk.before = nil
	c := newClient(t, secureClientOf(t, copied, config, "x"))
	c.expect(0, call{op: cmdRead, length: 512})
}

// TestHoldTLSRelease holds that clients over TLS go on after a hold that came to nothing.
func TestHoldTLSRelease(t *testing.T) {
	a := certs.New(t)
	s := secureServer(t, a)
	l := listenOn(t, "unix")
	serveOn(t, s, l)
	c := newClient(t, secureClientOf(t, l, trusting(a), ""))
	for range 10 {
		waiting := c.start(call{op: cmdRead, length: 100_000})
		h := hold(t, s)
		late := c.start(call{op: cmdWrite, data: make([]byte, 100_000)})
		h.Release()
		for _, ch := range []<-chan reply{waiting, late} {
			if r, ok := <-ch; !ok || r.errno != 0 {
				t.Errorf("%d, %v", r.errno, ok)
			}
		}
	}
}

// A halfPipe is an end of a pipe that can say it was shut down half-way.
type halfPipe struct {
	net.Conn
	shut *atomic.Int32
}

func (c halfPipe) CloseWrite() error {
	c.shut.Add(1)
	return nil
}

// TestFarewell holds for how long a client over TLS is waited for that does not hang up, and that
// Close does not wait.
func TestFarewell(t *testing.T) {
	a := certs.New(t)
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, s *server.Server, nc net.Conn) error
		took time.Duration
	}{
		{"Shutdown", func(t *testing.T, s *server.Server, _ net.Conn) error {
			return s.Shutdown(t.Context())
		}, 5 * time.Second},
		{"Close", func(t *testing.T, s *server.Server, _ net.Conn) error {
			short, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := s.Shutdown(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Shutdown: %v", err)
			}
			return errors.Join(s.Close(), s.Shutdown(t.Context()))
		}, time.Second},
		{"goodbye", func(_ *testing.T, _ *server.Server, nc net.Conn) error {
			_, err := nc.Write(call{op: cmdDisc}.encode(1))
			return err
		}, 0},
		{"Close at once", func(t *testing.T, s *server.Server, _ net.Conn) error {
			return errors.Join(s.Close(), s.Shutdown(t.Context()))
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := secureServer(t, a)
				ours, theirs := net.Pipe()
				defer ours.Close()
				var shut atomic.Int32
				over := make(chan error)
				go func() {
					session, err := s.Handshake(halfPipe{theirs, &shut})
					if err == nil {
						err = s.ServeSession(session)
					}
					over <- err
				}()
				nc := secured(t, ours, trusting(a), "", "")
				converse(t, nc, option(optExportName, ""), "0123456789")
				heard := make(chan error)
				go func() {
					_, err := nc.Read(make([]byte, 1))
					heard <- err
				}()
				synctest.Wait()
				begun := time.Now()
				ended := make(chan error)
				go func() { ended <- tt.end(t, s, nc) }()
				if err := <-heard; tt.took > 0 && (err != io.EOF || time.Since(begun) > 0) {
					t.Errorf("the client hears %v after %v", err, time.Since(begun))
				}
				err := <-over
				if tt.took > 0 {
					checkError(t, err, server.ErrShutdown)
				}
				if took := time.Since(begun); took != tt.took {
					t.Errorf("the end took %v", took)
				}
				if n := shut.Load(); (n > 0) != (tt.took > 0) {
					t.Errorf("shut down %d times", n)
				}
				checkError(t, <-ended, nil)
			})
		})
	}
}
