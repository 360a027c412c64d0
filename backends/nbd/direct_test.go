package nbd_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
)

// direct connects to an export for somebody else.
func direct(t *testing.T, u nbd.URI, o nbd.Options) *nbd.Direct {
	t.Helper()
	d, err := u.DialDirect(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// firstBytes reads the beginning of the export by simple replies, as the kernel does.
func firstBytes(t *testing.T, nc net.Conn, n int) []byte {
	t.Helper()
	if _, err := nc.Write(request(simple, 0, cmdRead, 9, 0, int64(n))); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 16+n)
	if _, err := io.ReadFull(nc, reply); err != nil {
		t.Fatal(err)
	}
	if magic := binary.BigEndian.Uint32(reply); magic != 0x67446698 || binary.BigEndian.Uint32(reply[4:]) != 0 {
		t.Fatalf("the reply begins with %x", reply[:8])
	}
	return reply[16:]
}

// TestDirect holds that each connection ends its negotiation with the export, by simple replies,
// and that the first is the one that has told what the export is.
func TestDirect(t *testing.T) {
	b := newMemory(t, 10000)
	if _, err := b.(io.WriterAt).WriteAt([]byte("a disk"), 0); err != nil {
		t.Fatal(err)
	}
	var l lines
	u := serve(t, b, new(server.Server))
	d := direct(t, u, nbd.Options{BlockSize: 512, Dial: l.dialTo(u)})
	if a := d.Agreement(); a.Size != 10000 || a.Structured || a.Extended || a.TLS || a.Contexts != nil {
		t.Errorf("the agreement is %+v", a)
	}
	if d.Size() != 9728 || d.Flags() != d.Agreement().Flags || d.BlockSizes().Minimum != 1 ||
		d.BlockSizes().Maximum != 32<<20 {
		t.Errorf("%d bytes, flags %v, %+v", d.Size(), d.Flags(), d.BlockSizes())
	}
	for i := range 2 {
		nc, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if got := firstBytes(t, nc, 6); string(got) != "a disk" {
			t.Errorf("connection %d reads %q", i, got)
		}
		if l.made != i+1 {
			t.Errorf("after %d times there were %d connections", i+1, l.made)
		}
	}
}

// TestDirectClose holds that a connection that nobody wanted does not stay, and that one that
// somebody has is not closed.
func TestDirectClose(t *testing.T) {
	for _, wanted := range []bool{false, true} {
		var l lines
		u := serve(t, newMemory(t, 512), new(server.Server))
		d := direct(t, u, nbd.Options{Dial: l.dialTo(u)})
		if wanted {
			nc, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
		}
		for range 2 {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		if l.made != 1 || l.closed == wanted {
			t.Errorf("wanted %t: %d connections, closed %t", wanted, l.made, l.closed)
		}
	}
}

// lines are what is known of the connections to a server.
type lines struct {
	made   int
	closed bool // the last one
}

func (l *lines) dialTo(u nbd.URI) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		nc, err := net.Dial(u.Network, u.Address)
		l.made++
		return &line{nc, l}, err
	}
}

type line struct {
	net.Conn
	of *lines
}

func (c *line) Close() error {
	c.of.closed = true
	return c.Conn.Close()
}

// TestDirectOther holds that another export in the place of the first is refused.
func TestDirectOther(t *testing.T) {
	for name, tt := range map[string]struct {
		size int64
		o    server.Options
		says string
	}{
		"size":      {2048, server.Options{}, "it has 2048 bytes, and had 1024"},
		"read-only": {1024, server.Options{ReadOnly: true}, "its flags are"},
		"blocks":    {1024, server.Options{BlockSize: 512}, "its block sizes are"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &restarter{t: t, path: filepath.Join(t.TempDir(), "s"), name: "disk"}
			r.offer(newMemory(t, 1024), server.Options{})
			r.start()
			defer func() { r.stop() }()
			d := direct(t, r.uri(), nbd.Options{})
			nc, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			nc.Close()
			r.stop()
			if _, err := d.Dial(t.Context()); err == nil {
				t.Error("it dials a server that is not there")
			}
			r.offer(newMemory(t, tt.size), tt.o)
			r.start()
			nc, err = d.Dial(t.Context())
			if err == nil {
				nc.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("it says %v, want %q", err, tt.says)
			}
		})
	}
}

// TestDirectSilent holds that a server which says nothing does not keep Dial for longer than an
// attempt may take.
func TestDirectSilent(t *testing.T) {
	r := &restarter{t: t, path: filepath.Join(t.TempDir(), "s"), name: "disk"}
	r.offer(newMemory(t, 1024), server.Options{})
	r.start()
	d := direct(t, r.uri(), nbd.Options{Reconnect: &nbd.Reconnect{Attempt: 50 * time.Millisecond}})
	nc, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	r.stop()
	l, err := net.Listen("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if nc, err := d.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("%v, %v", nc, err)
	}
}
