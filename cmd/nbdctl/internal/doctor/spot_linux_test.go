package doctor

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// stranger connects a device as another program does, which claims nothing.
func stranger(t *testing.T, k *nbdnltest.Kernel, index int) {
	t.Helper()
	l, err := serveUnix(1, 512)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
	cfg := trialConfig(nbdnl.Config{Sockets: l.kernel})
	cfg.Identifier = "stranger"
	if err := k.Client().ConnectIndex(t.Context(), index, cfg); err != nil {
		t.Fatal(err)
	}
}

func newBench(t *testing.T, k *nbdnltest.Kernel, fresh bool) *bench {
	t.Helper()
	b := &bench{machine: &Machine{System: k.System()}, client: k.Client(), fresh: fresh}
	if err := b.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSpotFresh shows that an index is made that nobody has leased, and that it
// is not taken for one's own any more when another program uses it.
func TestSpotFresh(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 2})
	pool, err := k.System().Claims().TryLease(2)
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, k, true)
	if b.index != 3 || !b.made {
		t.Fatalf("it took nbd%d, made %t", b.index, b.made)
	}
	if _, err := k.System().Claims().TryLease(3); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("nbd3 can be leased by others: %v", err)
	}
	stranger(t, k, 3)
	if err := b.cycle(t.Context(), nbdnl.Config{}, nil); err != nil || b.index != 4 || !b.made {
		t.Errorf("in use: %v, on nbd%d, made %t", err, b.index, b.made)
	}
	for _, s := range b.left {
		if err := b.vacate(s); err != nil {
			t.Error(err)
		}
	}
	if st, err := b.client.Status(t.Context(), 3); err != nil || st.Identifier != "stranger" || !st.Connected() {
		t.Errorf("the other program's device is %+v, %v", st, err)
	}
	for _, index := range []int{2, 3} {
		if index == 2 {
			err = pool.Release()
		} else if pool, err = k.System().Claims().TryLease(index); err == nil {
			err = pool.Release()
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// TestSpotSettings shows that an index that was there before gets its settings
// back, unless another program has connected it.
func TestSpotSettings(t *testing.T) {
	for name, tt := range map[string]struct {
		taken bool
		want  string
	}{"idle": {false, "128"}, "another's": {true, "1024"}} {
		t.Run(name, func(t *testing.T) {
			k := nbdnltest.New(t, nbdnltest.Options{Devices: 3})
			_, release := k.Hold(2)
			defer release()
			show(t, k, files{
				"sys/block/nbd1/queue/max_sectors_kb": "128",
				"sys/block/nbd1/queue/scheduler":      "[none] mq-deadline",
			})
			b := newBench(t, k, false)
			if b.index != 1 || b.made {
				t.Fatalf("it took nbd%d, made %t", b.index, b.made)
			}
			show(t, k, files{
				"sys/block/nbd1/queue/max_sectors_kb": "1024",
				"sys/block/nbd1/queue/scheduler":      "[none] mq-deadline",
			})
			if tt.taken {
				stranger(t, k, 1)
			}
			if err := b.vacate(b.spot); err != nil {
				t.Error(err)
			}
			got, err := os.ReadFile(k.Path("sys/block/nbd1/queue/max_sectors_kb"))
			if diff := cmp.Diff(tt.want, string(got)); diff != "" || err != nil {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

// TestSpotNone shows what is said when all devices are in use.
func TestSpotNone(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 1})
	_, release := k.Hold(0)
	defer release()
	b := &bench{machine: &Machine{System: k.System()}, client: k.Client()}
	if err := b.take(t.Context()); err == nil || err.Error() != "an idle device" {
		t.Error(err)
	}
}
