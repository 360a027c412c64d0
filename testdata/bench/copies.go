package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/nbdctl/nbdctl/testdata/bench/cputime"
)

// copyBlock, in bytes, and copyDepth, of a thread, are what nbdcopy has if nothing else is said.
const (
	copyBlock = 256 << 10
	copyDepth = 64
)

// A copying is a whole image that is read, and perhaps written to another server.
type copying struct {
	name        string
	connections int
	discarded   bool // There is no other server.
}

// copyings lists them. Clients and servers are on one processor where there is one connection, and
// on all where there are four.
var copyings = []copying{
	{"client/copy-null-c1", 1, true},
	{"client/copy-null-c4", 4, true},
	{"client/copy-c1", 1, false},
	{"client/copy-c4", 4, false},
}

// A copier is a program that copies.
type copier struct {
	name string
	role role
	// command says how to start it, with a source and perhaps a destination.
	command func(k copying, uris []string) []string
}

// copiers lists them. All of them move every byte: nbdcopy is told not to look for holes, of which
// the image has none. It takes part twice where it may choose fewer connections than it is told,
// the second time with a thread for each.
func (k copying) copiers(w *workspace) []copier {
	all := []copier{goCopier("backends/nbd", w.path("goclient"), ours)}
	if w.base != "" {
		return append(all, goCopier("base", w.path("base-goclient"), variant))
	}
	all = append(all, nbdcopy("nbdcopy"))
	if k.connections > 1 {
		threads := strconv.Itoa(k.connections)
		all = append(all, nbdcopy("nbdcopy -T "+threads, "--threads="+threads))
	}
	return all
}

func nbdcopy(name string, flags ...string) copier {
	return copier{name, peer, func(k copying, uris []string) []string {
		argv := []string{
			"nbdcopy", "--connections=" + strconv.Itoa(k.connections), "--no-extents", "--sparse=0",
			"--request-size=" + strconv.Itoa(copyBlock), "--requests=" + strconv.Itoa(copyDepth),
		}
		if k.discarded {
			uris = append(uris, "null:")
		}
		return slices.Concat(argv, flags, uris)
	}}
}

func goCopier(name, path string, r role) copier {
	return copier{name, r, func(k copying, uris []string) []string {
		return append([]string{
			path, "copy",
			"-c", strconv.Itoa(k.connections), "-b", strconv.Itoa(copyBlock), "-q", strconv.Itoa(k.depth()),
		}, uris...)
	}}
}

// depth is how many requests are in flight on each connection of ours, so that they are as many in
// all as those of nbdcopy. By itself that has no more connections than there are processors.
func (k copying) depth() int {
	return copyDepth * min(k.connections, runtime.NumCPU()) / k.connections
}

// measureCopies measures those copyings that are wanted.
func measureCopies(ctx context.Context, o options, w *workspace) ([]*result, error) {
	var results []*result
	for _, k := range copyings {
		if !o.wanted.MatchString(k.name) {
			continue
		}
		began := time.Now()
		r, err := k.run(ctx, o, w)
		if err != nil {
			return nil, err
		}
		results = append(results, r)
		log.Printf("%-26s %4.1f s", k.name, time.Since(began).Seconds())
	}
	return results, nil
}

// run has each copier make a copy that is compared. Then all of them take turns.
func (k copying) run(ctx context.Context, o options, w *workspace) (_ *result, err error) {
	room, remove, err := w.room()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	c := client{w: w, cpu: o.cpu, space: 2 * o.space, warm: o.warm, timed: o.timed}
	if k.connections > 1 {
		c.cpu = -1
	}
	from, err := c.filled(ctx, "from", room)
	if err != nil {
		return nil, err
	}
	defer from.stop()
	r := &result{Case: k.name, block: copyBlock, busy: c.cpu >= 0}
	for _, one := range k.copiers(w) {
		s := &serverResult{Name: one.name, Role: one.role}
		k.fail(s, k.verify(ctx, c, one, from, room))
		r.Servers = append(r.Servers, s)
	}
	servers := []*process{from}
	if !k.discarded {
		to, err := c.filled(ctx, "to", room) // It has all its memory then.
		if err != nil {
			return nil, err
		}
		defer to.stop()
		servers = append(servers, to)
	}
	k.rounds(ctx, c, r, servers, o.rounds)
	return r, ctx.Err()
}

// filled is a server that has an image.
func (c client) filled(ctx context.Context, name, room string) (*process, error) {
	p, err := startServer(ctx, c.w, nbdctlSized("nbdctl", name, c.space, ours), room, c.cpu)
	if err != nil {
		return nil, err
	}
	if err := c.fill(ctx, p); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (k copying) fail(s *serverResult, err error) {
	if err != nil {
		log.Printf("%s: %s fails: %v", k.name, s.Name, err)
		s.Failed, s.Samples = err.Error(), nil
	}
}

// verify has a server that is empty get a copy, and compares it.
func (k copying) verify(ctx context.Context, c client, one copier, from *process, room string) error {
	if k.discarded {
		return nil
	}
	to, err := startServer(ctx, c.w, nbdctlSized("nbdctl", "empty", c.space, ours), room, c.cpu)
	if err != nil {
		return err
	}
	defer to.stop()
	if _, err := k.once(ctx, c, one, []*process{from, to}); err != nil {
		return err
	}
	return c.check(ctx, to)
}

func (k copying) rounds(ctx context.Context, c client, r *result, servers []*process, rounds int) {
	all := k.copiers(c.w)
	for round := range rounds {
		for n := range all {
			i := turn(round, n, len(all))
			if r.Servers[i].Failed != "" || ctx.Err() != nil {
				continue
			}
			s, err := c.calm(func() (sample, error) { return k.once(ctx, c, all[i], servers) })
			r.Servers[i].Samples = append(r.Servers[i].Samples, s)
			k.fail(r.Servers[i], err)
		}
	}
}

// once copies. What the program takes to start and to end counts.
func (k copying) once(ctx context.Context, c client, one copier, servers []*process) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var uris []string
	for _, p := range servers {
		uris = append(uris, p.at.uri())
	}
	argv := pin(one.command(k, uris), c.cpu)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	before, err := usedBy(c.cpu, servers)
	if err != nil {
		return sample{}, err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return sample{}, fmt.Errorf("%w: %s", err, out)
	}
	after, err := usedBy(c.cpu, servers)
	elapsed, used := after.at.Sub(before.at), after.servers-before.servers
	own := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	requests := float64(c.space / copyBlock)
	return sample{
		IOPS:     requests / elapsed.Seconds(),
		MBps:     float64(c.space) / 1e6 / elapsed.Seconds(),
		ServerUS: used.Seconds() * 1e6 / requests,
		ClientUS: own.Seconds() * 1e6 / requests,
		Others:   max(0, (after.all-before.all-used-own).Seconds()/elapsed.Seconds()),
	}, err
}

// A usage is the CPU time that had been used at a time.
type usage struct {
	at           time.Time
	servers, all time.Duration
}

// usedBy returns what the servers have used, and all processes of a processor, or of all if it is
// negative.
func usedBy(cpu int, servers []*process) (usage, error) {
	u := usage{at: time.Now()}
	for _, p := range servers {
		used, err := cputime.Of(p.pid)
		if err != nil {
			return u, err
		}
		u.servers += used
	}
	var err error
	u.all, err = cputime.Processor(cpu)
	return u, err
}
