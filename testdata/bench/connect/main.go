// Connect measures how long devices take to come and to go: by the bare command of the kernel's
// netlink interface, with the same number of sockets, by nbdctl's pool, by nbd-client and by
// qemu-nbd; one after the other and many at once. And what a device costs that does nothing. make
// bench-connect runs it in the lab.
//
// The contenders take turns, round by round. A time is that of one device, from when it is asked
// for until it can be used: for the bare command and for nbdctl until the call returns, for a
// program until it has exited and the device has a size. Of the bare command the making of the
// sockets does not count, and nobody serves them; with nbdctl everything counts.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"
)

// A contender is a way to a device.
type contender interface {
	name() string
	// able reports whether it can have that many connections, and that many devices at once.
	able(connections, parallel int) bool
	// connect makes the device number i of those that are there at the same time, and returns what
	// ends it.
	connect(ctx context.Context, i, connections int) (end func() error, took time.Duration, err error)
}

// A trial is what is tried with each contender.
type trial struct {
	connections, parallel, rounds int
}

func (t trial) String() string { return fmt.Sprintf("%d conn × %d", t.connections, t.parallel) }

// line is one of the table, which is printed as it comes.
const line = "%-12v %-16s %14s %8s %8s %18s %8s %8s\n"

// times are how long it took, of all rounds and devices.
type times struct{ up, down []time.Duration }

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 20, "rounds with one device; with many of them there are fewer")
	only := flag.String("only", "", "`names` of contenders, with commas between them; default: all")
	idle := flag.Bool("idle", true, "measure what idle devices cost")
	side := flag.Int("parallel", 64, "leave out what has more devices at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *side, *only, *idle); err != nil {
		log.Fatal("connect: ", err)
	}
}

func run(ctx context.Context, rounds, side int, only string, idle bool) error {
	all, closeAll, err := contenders(ctx)
	if err != nil {
		return err
	}
	defer closeAll()
	if only != "" {
		wanted := strings.Split(only, ",")
		all = slices.DeleteFunc(all, func(c contender) bool { return !slices.Contains(wanted, c.name()) })
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	fmt.Printf("Linux %s\n", strings.TrimSpace(string(release)))
	fmt.Printf(line, "devices", "by", "connect p50 ms", "p99", "of bare", "disconnect p50 ms", "p99", "of bare")
	for _, t := range []trial{
		{1, 1, rounds},
		{2, 1, rounds},
		{4, 1, rounds},
		{8, 1, rounds},
		{1, 16, max(2, rounds/5)},
		{1, 64, max(2, rounds/10)},
	} {
		if t.parallel > side {
			continue
		}
		if err := compare(ctx, all, t); err != nil {
			return err
		}
	}
	if !idle {
		return nil
	}
	return measureIdle(ctx, os.Stdout)
}

// compare has the contenders take turns.
func compare(ctx context.Context, all []contender, t trial) error {
	able := slices.DeleteFunc(slices.Clone(all), func(c contender) bool { return !c.able(t.connections, t.parallel) })
	results := make([]times, len(able))
	for round := range t.rounds + 1 {
		for k := range able {
			i := (round + k) % len(able)
			got, err := once(ctx, able[i], t)
			if err != nil {
				return fmt.Errorf("%v by %s: %w", t, able[i].name(), err)
			}
			if round > 0 { // The first one makes what all later ones find.
				results[i].up = append(results[i].up, got.up...)
				results[i].down = append(results[i].down, got.down...)
			}
		}
	}
	for i, c := range able {
		up, down := of(results[i].up, results[0].up), of(results[i].down, results[0].down)
		fmt.Printf(line, t, c.name(), up[0], up[1], up[2], down[0], down[1], down[2])
	}
	return nil
}

// once has all devices of a trial come at once, and then go.
func once(ctx context.Context, c contender, t trial) (times, error) {
	var mu sync.Mutex // guards the three below
	var got times
	var ends []func() error
	var failed error
	note := func(to *[]time.Duration, took time.Duration, end func() error, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			failed = err
			return
		}
		*to = append(*to, took)
		if end != nil {
			ends = append(ends, end)
		}
	}
	var wg sync.WaitGroup
	for i := range t.parallel {
		wg.Go(func() {
			end, took, err := c.connect(ctx, i, t.connections)
			note(&got.up, took, end, err)
		})
	}
	wg.Wait()
	for _, end := range slices.Clone(ends) {
		wg.Go(func() {
			began := time.Now()
			err := end()
			note(&got.down, time.Since(began), nil, err)
		})
	}
	wg.Wait()
	return got, failed
}

// of says what times are, and what share of those that they are compared with.
func of(d, bare []time.Duration) [3]string {
	p50 := quantile(d, 50)
	return [3]string{number(ms(p50)), number(ms(quantile(d, 99))), number(float64(p50) / float64(quantile(bare, 50)))}
}

func number(f float64) string { return fmt.Sprintf("%.2f", f) }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func quantile(d []time.Duration, percent int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, len(d)*percent/100)]
}
