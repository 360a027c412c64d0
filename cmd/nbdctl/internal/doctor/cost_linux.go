package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends/memory"
)

const (
	// costRounds is how often each number of connections is tried, unless
	// costPatience is over before.
	costRounds   = 5
	costPatience = 2500 * time.Millisecond
	// slowConnect is far more than machines with some time to spare have been seen to need.
	slowConnect = 500 * time.Millisecond
)

// costCounts are the numbers of connections that are tried.
var costCounts = []int{1, 2, 4}

// cost tells what connecting costs.
func (m *Machine) cost(ctx context.Context) []Finding {
	b, needs := m.openBench(ctx)
	if needs != "" {
		return []Finding{unknown(needs)}
	}
	if m.trial == nil {
		return []Finding{unknown("a device that works")}
	}
	took, err := b.measure(ctx)
	if err != nil {
		return []Finding{m.failed(err)}
	}
	return []Finding{costOf(took, !m.release().Before(7, 3, 0))}
}

// costOf is the finding about connects and disconnects that took so long, by
// the number of connections.
func costOf(took map[int]time.Duration, cheap bool) Finding {
	var parts []string
	for _, n := range costCounts {
		if t, known := took[n]; known {
			parts = append(parts, fmt.Sprintf("%s for %d", milliseconds(t), n))
		}
	}
	seen := "to connect and disconnect takes at best " + strings.Join(parts, ", ") + " connections"
	if took[1] >= slowConnect {
		return warning("%s", seen).
			because("usual is less than a fifth of that").
			do("see what keeps the processors busy, or devices open (openers)")
	}
	f := ok("%s", seen)
	last := costCounts[len(costCounts)-1]
	if t, known := took[last]; known && t > took[1] {
		f.Seen += fmt.Sprintf(", %s for each further one", milliseconds((t-took[1])/time.Duration(last-1)))
	}
	if !cheap {
		f = f.because("before 7.3 the kernel stops the device's queue for each connection; " +
			"take no more than processors")
	}
	return f
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// measure returns the shortest time of a connect and a disconnect, by the number
// of connections: what else goes on at the machine only makes it longer.
func (b *bench) measure(ctx context.Context) (_ map[int]time.Duration, err error) {
	store, err := memory.New(deviceSize, memory.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	shortest := make(map[int]time.Duration)
	begin := time.Now()
	for round := range costRounds {
		for _, n := range costCounts {
			if round > 0 && time.Since(begin) > costPatience {
				break
			}
			dev, took, err := b.connect(ctx, &disk{memory: store}, n)
			if err != nil {
				return nil, err
			}
			b.settle(ctx) // whose time is not that of the kernel
			ending := time.Now()
			if err := b.disconnect(dev); err != nil {
				return nil, err
			}
			took += time.Since(ending)
			if least, known := shortest[n]; !known || took < least {
				shortest[n] = took
			}
		}
	}
	return shortest, nil
}
