package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/url"
	"time"
)

// A contender is a client of the one server that all of them have.
type contender struct {
	name string
	role role
	// verify has it read and compare all that is used of the export. nil: it can't.
	verify func(context.Context, client, *process) error
	load   func(context.Context, client, *process, load) (sample, error)
}

// contenders lists clients. The floor of them is loadgen. It keeps only those words of what it
// reads that it compares, and asks for simple replies.
func contenders(w *workspace) []contender {
	all := []contender{
		cClient("loadgen", floor),
		goClient("backends/nbd", "goclient", ours),
	}
	if w.base != "" {
		return append(all, goClient("base", "base-goclient", variant))
	}
	fio := func(ctx context.Context, c client, p *process, l load) (sample, error) { return c.fio(ctx, p, l) }
	return append(all, cClient("libnbd", peer), contender{name: "fio", role: peer, load: fio})
}

// cClient is the program of that name in the workspace, with loadgen's flags.
func cClient(program string, r role) contender {
	return contender{
		name: program,
		role: r,
		verify: func(ctx context.Context, c client, p *process) error {
			_, err := c.with(ctx, program, "verify", p, "-b", "131072", "-q", "8")
			return err
		},
		load: func(ctx context.Context, c client, p *process, l load) (sample, error) {
			return parseSample(c.with(ctx, program, "load", p, c.timedFlags(l)...))
		},
	}
}

// goClient is the program of that name in the workspace, which uses package backends/nbd.
func goClient(name, program string, r role) contender {
	return contender{
		name: name,
		role: r,
		verify: func(ctx context.Context, c client, p *process) error {
			argv := append([]string{c.w.path(program), "verify", "-b", "131072", "-q", "8"}, c.commonFlags(p)...)
			_, err := c.output(ctx, append(argv, p.at.uri())...)
			return err
		},
		load: func(ctx context.Context, c client, p *process, l load) (sample, error) {
			argv := append([]string{c.w.path(program), "load"}, c.commonFlags(p)...)
			argv = append(argv, c.timedFlags(l)...)
			return parseSample(c.output(ctx, append(argv, p.at.uri())...))
		},
	}
}

// uri is how clients other than loadgen name the place.
func (p place) uri() string { return "nbd+unix:///?socket=" + url.PathEscape(p.address) }

// fio uses fio's engine for NBD, which is made with libnbd. It compares nothing.
func (c client) fio(ctx context.Context, p *process, l load) (sample, error) {
	flags := append(fioFlags(l, c.space, c.timed), "--ioengine=nbd", "--uri="+p.at.uri())
	out, err := c.output(ctx, append([]string{"fio"}, flags...)...)
	if err != nil {
		return sample{}, err
	}
	return parseFio(out, l)
}

// A clientSuite is loads that the contenders give to one server in turn.
type clientSuite struct {
	suite
	// apart has the server run on another processor than the clients. Else all are on one.
	apart bool
}

// clientSuites lists all that is measured with contenders.
func clientSuites() []clientSuite {
	return []clientSuite{
		{suite{name: "client", loads: []load{rr4k, rw4k, rr4kQ1, rr128k, rw128k, sr1mQ4}}, false},
		{suite{name: "client", loads: apart(rr4k, rw4k, rr4kQ1)}, true},
	}
}

// apart names loads for a suite that is.
func apart(loads ...load) []load {
	for i := range loads {
		loads[i].name += "-apart"
	}
	return loads
}

// measureClients runs those suites of which cases are wanted, and then the copies. An earlier
// commit may have no client to be measured beside.
func measureClients(ctx context.Context, o options, w *workspace) ([]*result, error) {
	if w.baseClient != nil {
		return nil, nil
	}
	var results []*result
	for _, s := range clientSuites() {
		if s.suite = s.selected(o.wanted); len(s.loads) == 0 {
			continue
		}
		some, err := s.run(ctx, o, w)
		if err != nil {
			return nil, err
		}
		results = append(results, some...)
	}
	copies, err := measureCopies(ctx, o, w)
	return append(results, copies...), err
}

// A clientContest is a suite that runs.
type clientContest struct {
	client
	p       *process
	all     []contender
	failed  []error // of each contender, the first
	results []*result
}

// run starts the server, has each contender compare what it reads, and takes turns with them for
// each load. A contender that fails anywhere has no numbers.
func (s clientSuite) run(ctx context.Context, o options, w *workspace) (_ []*result, err error) {
	room, remove, err := w.room()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	c := client{w: w, cpu: o.cpu, apart: s.apart, space: o.space, warm: o.warm, timed: o.timed}
	cpu := o.cpu
	if s.apart {
		cpu = 1 - o.cpu
	}
	p, err := startServer(ctx, w, nbdctlMemory("nbdctl", ours), room, cpu)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	if err := c.verify(ctx, p); err != nil {
		return nil, err
	}
	k := &clientContest{client: c, p: p, all: contenders(w)}
	k.failed = make([]error, len(k.all))
	for i, one := range k.all {
		if one.verify != nil {
			k.fail(i, one.verify(ctx, c, p))
		}
	}
	for _, l := range s.loads {
		k.measure(ctx, s.caseName(l), l, o.rounds, !s.apart)
		if l.writes() { // What fio leaves has no mark where the others look for one.
			err = errors.Join(err, c.fill(ctx, p))
		}
	}
	disqualify(k.results, k.failed)
	return k.results, errors.Join(ctx.Err(), err, c.verify(ctx, p))
}

// startServer starts a server with its socket, and its image if it has one, in room.
func startServer(ctx context.Context, w *workspace, s server, room string, cpu int) (*process, error) {
	at, err := placeFor(s, "unix", room, room, exportSize)
	if err != nil {
		return nil, err
	}
	return s.start(ctx, w, at, cpu)
}

func (k *clientContest) fail(i int, err error) {
	if err != nil {
		log.Printf("%s fails: %v", k.all[i].name, err)
		k.failed[i] = err
	}
}

// measure has the contenders give a load in turn.
func (k *clientContest) measure(ctx context.Context, name string, l load, rounds int, together bool) {
	began := time.Now()
	r := &result{Case: name, block: l.block, busy: together}
	for _, one := range k.all {
		r.Servers = append(r.Servers, &serverResult{Name: one.name, Role: one.role})
	}
	k.results = append(k.results, r)
	for round := range rounds {
		for n := range k.all {
			i := turn(round, n, len(k.all))
			if k.failed[i] != nil || ctx.Err() != nil {
				continue
			}
			s, err := k.calm(func() (sample, error) { return k.all[i].load(ctx, k.client, k.p, l) })
			if err != nil {
				k.fail(i, fmt.Errorf("%s: %w", name, err))
				continue
			}
			r.Servers[i].Samples = append(r.Servers[i].Samples, s)
		}
	}
	log.Printf("%-26s %4.1f s", name, time.Since(began).Seconds())
}
