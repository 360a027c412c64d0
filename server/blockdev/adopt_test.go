package blockdev

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// An orphan is a device that somebody has connected and left, with a copy of the kernel's end of
// each connection.
type orphan struct {
	*nbdnltest.Kernel
	machine machine
	options Options
	e       existing
	kernel  []*os.File
}

// orphaned connects a device for a store, of which the server's ends stay open and nobody serves
// them.
func orphaned(t *testing.T, ko nbdnltest.Options, connections int) *orphan {
	t.Helper()
	k, m, o := labOn(t, ko)
	l, err := openLinks(connections, ampleSendBuffer, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	e := existing{
		index: 3, identifier: "left:1", size: size, blockSize: 512,
		flags: nbdnl.FlagHasFlags | nbdnl.FlagSendFlush | nbdnl.FlagSendFUA | nbdnl.FlagSendTrim |
			nbdnl.FlagCanMultiConn,
		timeout: 7 * time.Second, deadTimeout: 9 * time.Second,
		links: l.ends(),
	}
	err = o.Client.ConnectIndex(t.Context(), e.index, nbdnl.Config{
		Sockets: l.kernel, Size: e.size, BlockSize: e.blockSize, Flags: e.flags, Identifier: e.identifier,
		Timeout: e.timeout, DeadConnTimeout: e.deadTimeout,
	})
	if err != nil {
		t.Fatal(err)
	}
	e.incarnation = m.system.IncarnationOf(e.index)
	return &orphan{Kernel: k, machine: m, options: o, e: e, kernel: l.kernelEnds}
}

// adopt adopts the device, and ends it with the test.
func (o *orphan) adopt(t *testing.T) *Device {
	t.Helper()
	d, err := o.machine.adopt(t.Context(), o.e, newElastic(), o.options, nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// duplicate returns a connection over a copy of the descriptor of another one, as another process
// would have it, and closes that.
func duplicate(t *testing.T, c net.Conn) net.Conn {
	t.Helper()
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	copied, err := net.FileConn(f)
	if err := errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { copied.Close() })
	return copied
}

// read sends the kernel's read of a block, and holds that the answer is good.
func read(t *testing.T, kernel *os.File) {
	t.Helper()
	if _, err := kernel.Write(readRequest(0)); err != nil {
		t.Fatal(err)
	}
	answered(t, kernel)
}

// answered holds that a read is answered.
func answered(t *testing.T, kernel *os.File) {
	t.Helper()
	p := make([]byte, wire.SimpleReplySize+512)
	if _, err := io.ReadFull(kernel, p); err != nil {
		t.Fatal(err)
	}
	var r wire.SimpleReply
	if err := r.Decode((*[wire.SimpleReplySize]byte)(p)); err != nil || r.Errno != 0 || r.Cookie != 42 {
		t.Errorf("reply %+v, %v", r, err)
	}
}

// TestAdopt goes on with a device that another process has served, from the middle of a request on,
// and ends it.
func TestAdopt(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Disconnect": func(d *Device) error { return d.Disconnect(context.Background()) },
		"Close":      (*Device).Close,
	} {
		t.Run(name, func(t *testing.T) {
			o := orphaned(t, nbdnltest.Options{}, 2)
			if _, err := o.kernel[0].Write(readRequest(0)); err != nil {
				t.Fatal(err)
			}
			unread := make([]byte, 5)
			if _, err := io.ReadFull(o.e.links[0].conn, unread); err != nil {
				t.Fatal(err)
			}
			o.e.links[0].unread = unread
			for i := range o.e.links {
				o.e.links[i].conn = duplicate(t, o.e.links[i].conn)
			}
			givenBack := 0
			giveBack := func() error { givenBack++; return nil }
			d, err := o.machine.adopt(t.Context(), o.e, newElastic(), o.options, nil, giveBack)
			if err != nil {
				t.Fatal(err)
			}
			answered(t, o.kernel[0])
			read(t, o.kernel[1])
			if d.Index() != 3 || d.Identifier() != "left:1" || d.Size() != size ||
				d.Timeout() != 7*time.Second || d.DeadTimeout() != 9*time.Second ||
				d.State() != nbdnl.StateLive || d.Connections() != 2 || d.ReadOnly() {
				t.Errorf("nbd%d %q of %d bytes, %v, %v, %s, %d connections, read-only %t",
					d.Index(), d.Identifier(), d.Size(),
					d.Timeout(), d.DeadTimeout(),
					d.State(), d.Connections(), d.ReadOnly())
			}
			if n := o.Commands(nbdnltest.Connect) + o.Commands(nbdnltest.Reconfigure); n != 1 {
				t.Errorf("the kernel got %d commands, want only the connect of the other process", n)
			}
			if err := end(d); err != nil || givenBack != 1 {
				t.Errorf("error %v, given back %d times", err, givenBack)
			}
			checkClean(t, o.Kernel)
		})
	}
}

// TestAdoptReconnect adopts a device some or all of whose connections have died: they are replaced.
func TestAdoptReconnect(t *testing.T) {
	for _, dead := range []int{1, 2} {
		o := orphaned(t, nbdnltest.Options{}, 2)
		for i := range dead {
			o.e.links[i].conn.Close()
			o.e.links[i].conn = nil
		}
		d := o.adopt(t)
		for d.State() != nbdnl.StateLive || o.Commands(nbdnltest.Reconfigure) < dead {
			select {
			case <-d.Changes():
			case <-d.Done():
				t.Fatal(d.Err())
			}
		}
		if n := o.Dead(d.Index()); n != 0 {
			t.Errorf("%d connections of the kernel are dead", n)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, o.Kernel)
	}
}

// TestAdoptMismatch holds that a device is refused that is not the one, or for a backend that does
// not fit, that each difference is named, and that the device waits as before: the right one is
// adopted after that.
func TestAdoptMismatch(t *testing.T) {
	for name, tt := range map[string]struct {
		old    bool // a kernel without identifiers
		change func(o *orphan, e *existing, b *fitting)
		want   []string
	}{
		"identifier": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.identifier = "other" },
			want:   []string{"identifier"},
		},
		"incarnation": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.incarnation++ },
			want:   []string{"incarnation"},
		},
		"incarnation, no identifiers": {
			old:    true,
			change: func(_ *orphan, e *existing, _ *fitting) { e.incarnation++ },
			want:   []string{"incarnation"},
		},
		"nothing to know it by": {
			old:    true,
			change: func(_ *orphan, e *existing, _ *fitting) { e.incarnation = 0 },
			want:   []string{"incarnation"},
		},
		"idle": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.index = 4 },
			want:   []string{"state"},
		},
		"by ioctl": {
			change: func(o *orphan, e *existing, _ *fitting) { o.ioctl(e) },
			want:   []string{"mode", "incarnation"},
		},
		"size": {
			change: func(_ *orphan, e *existing, b *fitting) { e.size *= 2; b.size = e.size },
			want:   []string{"size"},
		},
		"backend size": {
			change: func(_ *orphan, _ *existing, b *fitting) { b.size /= 2 },
			want:   []string{"backend size"},
		},
		"block size": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.blockSize = 1024 },
			want:   []string{"block size"},
		},
		"flags": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.flags = nbdnl.FlagHasFlags | nbdnl.FlagCanMultiConn },
			want:   []string{"flush", "fua", "trim"},
		},
		"read-only": {
			change: func(_ *orphan, e *existing, _ *fitting) { e.flags |= nbdnl.FlagReadOnly },
			want:   []string{"read-only", "backend flush", "backend fua", "backend trim"},
		},
		"backend without trim": {
			change: func(_ *orphan, _ *existing, b *fitting) { b.plain = true },
			want:   []string{"backend trim"},
		},
		"longest request": {
			change: func(_ *orphan, _ *existing, b *fitting) { b.maximum = 64 << 10 },
			want:   []string{"max_sectors_kb"},
		},
		"several": {
			change: func(_ *orphan, e *existing, b *fitting) { e.identifier = "other"; b.size /= 2 },
			want:   []string{"identifier", "backend size"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var ko nbdnltest.Options
			if tt.old {
				ko.Release = "5.10.0"
			}
			o := orphaned(t, ko, 1)
			e, b := o.e, &fitting{store: newStore(), size: size}
			tt.change(o, &e, b)
			if _, err := o.kernel[0].Write(readRequest(0)); err != nil {
				t.Fatal(err)
			}
			before := o.Setting(3)
			givenBack := 0
			giveBack := func() error { givenBack++; return nil }
			d, err := o.machine.adopt(t.Context(), e, b.backend(), o.options, nil, giveBack)
			if d != nil || givenBack != 1 {
				t.Fatalf("it was adopted, or given back %d times", givenBack)
			}
			if diff := cmp.Diff(tt.want, mismatches(err)); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			if diff := cmp.Diff(before, o.Setting(3)); diff != "" || o.Dead(3) != 0 || o.Syncs(3) != 0 {
				t.Errorf("the device was touched: %d syncs, %d dead (-want +got):\n%s", o.Syncs(3), o.Dead(3), diff)
			}
			d, err = o.machine.adopt(t.Context(), o.e, newElastic(), o.options, nil, func() error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			answered(t, o.kernel[0])
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAdoptNoLinks holds that what can't be is refused before anything is looked at.
func TestAdoptNoLinks(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 1)
	o.e.links = nil
	refused := errors.New("not given back")
	for _, b := range []backends.Backend{newStore(), nil} {
		d, err := o.machine.adopt(t.Context(), o.e, b, o.options, nil, func() error { return refused })
		if d != nil || !errors.Is(err, refused) {
			t.Errorf("device %v, error %v", d, err)
		}
	}
	if err := o.options.Client.Drop(t.Context(), o.e.index, o.e.identifier); err != nil {
		t.Error(err)
	}
}

// mismatches returns the settings that an error names.
func mismatches(err error) (settings []string) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		var m *MismatchError
		if errors.As(err, &m) {
			settings = append(settings, m.Setting)
		}
		return settings
	}
	for _, e := range joined.Unwrap() {
		settings = append(settings, mismatches(e)...)
	}
	return settings
}

// ioctl connects a device by ioctls, which takes the place of the other one.
func (o *orphan) ioctl(e *existing) {
	e.index = 5
	o.ConnectIoctl(e.index, uint64(e.size))
}

// A fitting backend is a store that can be made not to fit.
type fitting struct {
	store
	size    int64
	plain   bool
	maximum int
}

func (b *fitting) Size() int64 { return b.size }

func (b *fitting) BlockSizes() backends.BlockSizes { return backends.BlockSizes{Maximum: b.maximum} }

func (b *fitting) backend() backends.Backend {
	if b.plain {
		return struct {
			*bytes.Reader
			io.WriterAt
		}{b.Reader, plainWriter{}}
	}
	return b
}

type plainWriter struct{}

func (plainWriter) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// ends returns the server's ends.
func (l *links) ends() []link {
	ends := make([]link, len(l.server))
	for i, c := range l.server {
		ends[i].conn = c
	}
	return ends
}
