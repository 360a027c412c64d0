package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"regexp"
	"time"
)

// A suite is servers that run side by side, and loads that each of them gets in turn.
type suite struct {
	name    string
	network string // unix or tcp
	onDisk  bool   // where images lie; else in memory
	pinned  bool   // all on one processor; else on all
	servers []server
	loads   []load
	// once makes one round do, for what is shown and not compared.
	once bool
	// waits tells that the servers' backend does, so that the processor is not always busy.
	waits bool
	// counts tells that the servers count allocations.
	counts bool
}

// caseName is how a load of a suite is selected and reported.
func (s suite) caseName(l load) string { return s.name + "/" + l.name }

// selected returns the suite with those of its loads that are wanted.
func (s suite) selected(wanted *regexp.Regexp) suite {
	var loads []load
	for _, l := range s.loads {
		if wanted.MatchString(s.caseName(l)) {
			loads = append(loads, l)
		}
	}
	s.loads = loads
	return s
}

// A result is what all servers of a suite did with one load. Samples with the same index were taken
// in the same round.
type result struct {
	Case    string          `json:"case"`
	Servers []*serverResult `json:"servers"`
	block   int
	// busy tells that client and server had one processor, and one of them always used it.
	busy bool
}

type serverResult struct {
	Name    string   `json:"name"`
	Role    role     `json:"role"`
	Failed  string   `json:"failed,omitempty"` // why there are no samples
	Samples []sample `json:"samples"`
}

// A contest is a suite that runs.
type contest struct {
	suite
	client
	rounds    int
	processes []*process // nil where a server did not start
	failed    []error    // of each server, the first
	results   []*result  // of each load
}

// runSuite starts the servers, checks that they keep data, takes turns with them for each load, and
// checks again. A server that fails anywhere has no numbers. An error is not about a server.
func runSuite(ctx context.Context, s suite, o options, w *workspace) (_ []*result, err error) {
	c := &contest{
		suite:  s,
		rounds: o.rounds,
		client: client{w: w, cpu: o.cpu, space: o.space, warm: o.warm, timed: o.timed},
	}
	if !s.pinned {
		c.cpu = -1
	}
	if s.once {
		c.rounds = 1
	}
	c.processes = make([]*process, len(s.servers))
	c.failed = make([]error, len(s.servers))
	room, remove, err := w.room()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	defer c.stop()
	if err := c.start(ctx, room); err != nil {
		return nil, err
	}
	for _, l := range s.loads {
		if err := c.measure(ctx, l); err != nil {
			return nil, err
		}
	}
	c.each(func(i int, p *process) error { return c.verify(ctx, p) })
	disqualify(c.results, c.failed)
	return c.results, ctx.Err()
}

// start starts the servers, with their sockets and, if they are in memory, their images in room.
func (c *contest) start(ctx context.Context, room string) error {
	images := room
	if c.onDisk {
		images = c.w.path("images")
	}
	for i, s := range c.servers {
		at, err := placeFor(s, c.network, room, images, c.space)
		if err != nil {
			return err
		}
		if c.processes[i], err = s.start(ctx, c.w, at, c.cpu); err != nil {
			c.fail(i, err)
		}
	}
	c.each(func(i int, p *process) error { return c.verify(ctx, p) })
	return ctx.Err()
}

func (c *contest) stop() {
	for _, p := range c.processes {
		if p != nil {
			p.stop()
		}
	}
}

func (c *contest) fail(i int, err error) {
	log.Printf("%s: %s fails: %v", c.name, c.servers[i].name, err)
	c.failed[i] = err
}

// each calls f for each server that has not failed.
func (c *contest) each(f func(int, *process) error) {
	for i, p := range c.processes {
		if c.failed[i] != nil {
			continue
		}
		if err := f(i, p); err != nil {
			c.fail(i, err)
		}
	}
}

// turn is whose turn it is, as number k of n in a round. Each round begins with another server, and
// every other one goes backwards: who comes behind a certain other is some percent faster or
// slower.
func turn(round, k, n int) int {
	if round/n%2 == 1 {
		k = n - k
	}
	return (round + k) % n
}

// measure gives a load to the servers in turn.
func (c *contest) measure(ctx context.Context, l load) error {
	began := time.Now()
	r := &result{Case: c.caseName(l), block: l.block, busy: c.pinned && !c.waits}
	for _, s := range c.servers {
		r.Servers = append(r.Servers, &serverResult{Name: s.name, Role: s.role})
	}
	c.results = append(c.results, r)
	for round := range c.rounds {
		for k := range c.servers {
			i := turn(round, k, len(c.servers))
			if c.failed[i] != nil {
				continue
			}
			s, err := c.sample(ctx, c.processes[i], l)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				c.fail(i, fmt.Errorf("%s: %w", l.name, err))
				continue
			}
			r.Servers[i].Samples = append(r.Servers[i].Samples, s)
		}
	}
	if l.writes() && l.block > 4<<10 {
		c.each(func(_ int, p *process) error { return c.fill(ctx, p) })
	}
	log.Printf("%-26s %4.1f s", r.Case, time.Since(began).Seconds())
	return nil
}

func (c *contest) sample(ctx context.Context, p *process, l load) (sample, error) {
	if !c.counts {
		return c.run(ctx, p, l)
	}
	return c.countAllocations(ctx, p, l)
}

// disqualify takes the samples of servers that failed at any time.
func disqualify(results []*result, failed []error) {
	for i, err := range failed {
		if err == nil {
			continue
		}
		for _, r := range results {
			r.Servers[i].Samples = nil
			r.Servers[i].Failed = err.Error()
		}
	}
}
