package blockdev

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestReceived holds that a device is connected again whose connections the kernel does not all
// receive from, a few times, and that it is used all the same when that does not help. Of one
// connection nobody asks.
func TestReceived(t *testing.T) {
	for _, tt := range []struct {
		name        string
		connections int
		strand      []int
		connects    int
		warns       bool
	}{
		{"all", 4, nil, 1, false},
		{"once", 4, []int{2}, 2, false},
		{"twice", 2, []int{1, 1}, 3, false},
		{"always", 2, []int{1, 1, 1}, 3, true},
		{"one connection", 1, []int{1}, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			k, m, lab := labOn(t, nbdnltest.Options{})
			k.Strand(tt.strand...)
			var said bytes.Buffer
			lab.Connections, lab.Logger = tt.connections, slog.New(slog.NewTextHandler(&said, nil))
			givenBack := 0
			giveBack := func() error { givenBack++; return nil }
			device := func() (*Device, error) { return m.newDevice(newStore(), lab) }
			d, err := m.establish(t.Context(), device, placeAt(anyIndex), giveBack)
			if err != nil {
				t.Fatal(err)
			}
			if n := k.Commands(nbdnltest.Connect); n != tt.connects {
				t.Errorf("%d connects, want %d", n, tt.connects)
			}
			sockets := k.Setting(d.Index()).Sockets
			if d.State() != nbdnl.StateLive || sockets != tt.connections || givenBack != 0 {
				t.Errorf("%s, the kernel has %d connections, given back %d times", d.State(), sockets, givenBack)
			}
			if warns := strings.Contains(said.String(), "level=WARN msg=\"requests may hang"); warns != tt.warns {
				t.Errorf("the log says: %s", said.String())
			}
			if err := d.Close(); err != nil || givenBack != 1 {
				t.Errorf("Close: %v, given back %d times", err, givenBack)
			}
			checkClean(t, k)
		})
	}
}
