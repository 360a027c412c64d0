package main

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
)

// disconnectAtOnce bounds the devices that are taken down at a time. Each may
// keep a thread in the kernel. They share the looks at all processes.
const disconnectAtOnce = 256

// A target is one device that is to be disconnected.
type target struct {
	inventory.Device
	// missing is why there is none.
	missing error
	// above are those that must go before it: they are stored on it.
	above []*target

	done           chan struct{} // closed when what follows is set
	stdout, stderr bytes.Buffer
	err            error
}

// targets finds the devices that are meant, each once.
func targets(ctx context.Context, c *cli.Context, in *inventory.Inventory) (all []*target) {
	add := func(d inventory.Device, missing error) {
		same := func(t *target) bool { return t.missing == nil && t.Index == d.Index }
		if missing != nil || !slices.ContainsFunc(all, same) {
			all = append(all, &target{Device: d, missing: missing, done: make(chan struct{})})
		}
	}
	if !c.Bool("all") {
		for _, name := range c.Args().Slice() {
			add(in.Lookup(ctx, name))
		}
		return all
	}
	devices, _, err := in.Connected()
	if err != nil {
		warn(c, []string{err.Error()})
	}
	for _, d := range devices {
		if (d.Connected() || d.Ended()) && d.Ours() {
			add(d, nil)
		}
	}
	return all
}

// stacked puts the targets in the order in which they can go: none comes before
// what is stored on it.
func stacked(all []*target) []*target {
	if len(all) < 2 {
		return all
	}
	below := make(map[*target][]int)
	for _, t := range all {
		if t.Entry != nil {
			below[t] = t.Entry.Below()
		}
	}
	return ordered(all, func(upper, lower *target) bool {
		return lower.missing == nil && slices.Contains(below[upper], lower.Index)
	})
}

// ordered is stacked for what is known of two devices.
func ordered(all []*target, on func(upper, lower *target) bool) []*target {
	var order []*target
	seen := make(map[*target]bool)
	var visit func(t *target)
	visit = func(t *target) {
		seen[t] = true
		for _, upper := range all {
			if upper == t || !on(upper, t) {
				continue
			}
			if !seen[upper] {
				visit(upper)
			}
			// In a circle there is one for which nobody can wait.
			if slices.Contains(order, upper) {
				t.above = append(t.above, upper)
			}
		}
		order = append(order, t)
	}
	for _, t := range all {
		if !seen[t] {
			visit(t)
		}
	}
	return order
}

// disconnectMany takes the targets down, many at a time, and prints what each
// has to say in their order.
func disconnectMany(ctx context.Context, c *cli.Context, system nbdnl.System, order []*target) error {
	client, err := system.NewClient() // one, so that they share their looks at all processes
	if err == nil {
		defer client.Close()
	}
	for _, t := range order {
		if t.missing == nil {
			t.missing = err
		}
	}
	var all sync.WaitGroup
	defer all.Wait()
	places := make(chan struct{}, disconnectAtOnce)
	for _, t := range order {
		all.Go(func() {
			defer close(t.done)
			for _, upper := range t.above {
				<-upper.done
			}
			places <- struct{}{}
			defer func() { <-places }()
			t.disconnect(ctx, c, client)
		})
	}
	var errs []error
	for _, t := range order {
		<-t.done
		_, err1 := t.stdout.WriteTo(c.App.Writer)
		_, err2 := t.stderr.WriteTo(c.App.ErrWriter)
		errs = append(errs, t.err, err1, err2)
	}
	return errors.Join(errs...)
}

// disconnect takes the target down, and keeps what is said of it.
func (t *target) disconnect(ctx context.Context, c *cli.Context, client *nbdnl.Client) {
	app, own := *c.App, *c
	app.Writer, app.ErrWriter = &t.stdout, &t.stderr
	own.App = &app
	var loss error
	err := t.missing
	if err == nil {
		loss, err = disconnectOne(ctx, &own, client, t.Device)
	}
	if c.Bool("all") && exit.Of(err) == exit.NotFound {
		err = nil // somebody else was quicker, with the same result
	}
	t.err = errors.Join(err, loss)
}
