package nbd_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// TestClose holds that a client takes leave if nobody waits for anything, once, and that nothing is
// asked afterwards.
func TestClose(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		r.works()
		closed := r.effect(r.c.Close)
		want := request(r.form, 0, cmdDisc, 0, 0, 0)
		got, err := io.ReadAll(r.nc)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("the last words are %x, want %x (%v)", got, want, err)
		}
		if err := (<-closed).err; err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := r.c.Close(); err != nil {
				t.Errorf("again: %v", err)
			}
		}
		for _, command := range commands {
			if command == cmdStatus && r.form == simple {
				continue
			}
			if got := <-r.makes(command); !errors.Is(got.err, net.ErrClosed) || got.n != 0 {
				t.Errorf("command %d afterwards: %d, %v", command, got.n, got.err)
			}
		}
	})
}

// TestCloseInFlight holds that all who wait get an error, whatever they wait for, and that the
// server hears no goodbye in the middle of something.
func TestCloseInFlight(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		ctx, _ := endable(t)
		all := []<-chan result{
			r.read(make([]byte, 100), 0), r.readContext(ctx, make([]byte, 100<<10), 0), r.write(make([]byte, 100), 0),
			r.effect(r.c.Sync),
		}
		r.next()
		q := r.next()
		if q.command == cmdRead { // One is in the middle of its data.
			r.say(r.filled(q, make([]byte, q.length))[:50])
		}
		synctest.Wait()
		closed := r.effect(r.c.Close)
		rest, err := io.ReadAll(r.nc)
		for _, is := range all {
			if got := <-is; !errors.Is(got.err, net.ErrClosed) || got.n != 0 {
				t.Errorf("%d, %v", got.n, got.err)
			}
		}
		if err := (<-closed).err; err != nil {
			t.Error(err)
		}
		if goodbye := request(r.form, 0, cmdDisc, 0, 0, 0); bytes.Contains(rest, goodbye) {
			t.Errorf("the server hears %x (%v)", rest, err)
		}
	})
}

// TestCloseOfWaiting holds that also those get an error who wait for others to be answered, or for
// the server to read what they say.
func TestCloseOfWaiting(t *testing.T) {
	for _, size := range []int{10, 100 << 10} {
		for _, f := range forms {
			bubbleWith(t, f, nbd.Options{MaxInFlight: 3}, func(t *testing.T, r *rig) {
				var all []<-chan result
				for range 20 {
					all = append(all, r.write(make([]byte, size), 0), r.read(make([]byte, size), 0))
				}
				synctest.Wait()
				begun := time.Now()
				if err := r.c.Close(); err != nil || time.Since(begun) != 0 {
					t.Errorf("%v after %v", err, time.Since(begun))
				}
				for _, is := range all {
					if got := <-is; !errors.Is(got.err, net.ErrClosed) || got.n != 0 {
						t.Errorf("%d, %v", got.n, got.err)
					}
				}
			})
		}
	}
}

// TestCloseUnheard holds that a server that does not read can't keep Close from returning for more
// than a second.
func TestCloseUnheard(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		begun := time.Now()
		if err := r.c.Close(); err != nil {
			t.Error(err)
		}
		if d := time.Since(begun); d != time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// TestCloseMeanwhile holds that requests that come while a client takes leave fail, and are not
// sent.
func TestCloseMeanwhile(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		closed := r.effect(r.c.Close)
		synctest.Wait() // It says goodbye, and nobody listens.
		all := []<-chan result{
			r.read(make([]byte, 100), 0), r.write(make([]byte, 100), 0), r.write(make([]byte, 100<<10), 0),
			r.effect(r.c.Sync),
		}
		synctest.Wait()
		got, err := io.ReadAll(r.nc)
		if want := request(r.form, 0, cmdDisc, 0, 0, 0); !bytes.Equal(got, want) {
			t.Errorf("the last words are %x, want %x (%v)", got, want, err)
		}
		for _, is := range all {
			if got := <-is; !errors.Is(got.err, net.ErrClosed) {
				t.Errorf("%d, %v", got.n, got.err)
			}
		}
		if err := (<-closed).err; err != nil {
			t.Error(err)
		}
	})
}

// TestCloseTLS holds that a client takes leave of TLS, too, and for no longer than without it if
// the server does not listen; and that it is no error if the server hangs up when it has heard
// that.
func TestCloseTLS(t *testing.T) {
	authority := certs.New(t)
	for name, tt := range map[string]struct {
		listens func(r *rig)
		took    time.Duration
	}{
		"to nothing": {func(r *rig) {}, time.Second},
		"to half":    {func(r *rig) { r.next() }, time.Second},
		"to half, and leaves": {func(r *rig) {
			r.next()
			synctest.Wait() // The client says goodbye to TLS, and nobody listens.
			r.nc.(*tls.Conn).NetConn().Close()
		}, 0},
		"to all": {func(r *rig) {
			r.next()
			if n, err := r.nc.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("behind the last word: %d, %v", n, err)
			}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				secure := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{authority.Server}})
				shaken := make(chan error, 1)
				go func() { shaken <- secure.Handshake() }()
				local := tls.Client(client, &tls.Config{ServerName: "localhost", RootCAs: authority.Pool})
				if err := errors.Join(local.Handshake(), <-shaken); err != nil {
					t.Fatal(err)
				}
				r := newRig(t, simple, local, secure, nbd.Options{})
				r.works()
				begun := time.Now()
				closed := r.effect(r.c.Close)
				tt.listens(r)
				if err := (<-closed).err; err != nil {
					t.Error(err)
				}
				if d := time.Since(begun); d != tt.took {
					t.Errorf("it took %v", d)
				}
				server.Close()
			})
		})
	}
}

// TestCloseHangUp holds that it is no error if a server hangs up as soon as it hears that the
// client leaves.
func TestCloseHangUp(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		closed := r.effect(r.c.Close)
		synctest.Wait() // It says goodbye, and nobody listens.
		r.nc.Close()
		if err := (<-closed).err; err != nil {
			t.Error(err)
		}
	})
}
