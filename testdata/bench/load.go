package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// A load is what a client does to a server.
type load struct {
	name        string
	connections int // 0: one
	depth       int // requests in flight on each
	block       int // bytes of a request
	reads       int // percent
	sequential  bool
	kernel      bool // frame requests as the kernel's client does
	structured  bool // ask for structured replies
	empty       bool // read where nobody has written
}

func (l load) writes() bool { return l.reads < 100 }

func (l load) flags() []string {
	flags := []string{
		"-q", strconv.Itoa(l.depth),
		"-b", strconv.Itoa(l.block),
		"-r", strconv.Itoa(l.reads),
		"-c", strconv.Itoa(max(l.connections, 1)),
	}
	if l.sequential {
		flags = append(flags, "-s")
	}
	if l.kernel {
		flags = append(flags, "-k")
	}
	if l.structured {
		flags = append(flags, "-x")
	}
	if l.empty {
		flags = append(flags, "-e")
	}
	return flags
}

// The loads have the names of fio's: random or sequential, read or write, size, queue depth.
var (
	rr4kQ1   = load{name: "rr4k-q1", depth: 1, block: 4 << 10, reads: 100}
	rr4k     = load{name: "rr4k-q32", depth: 32, block: 4 << 10, reads: 100}
	rw4k     = load{name: "rw4k-q32", depth: 32, block: 4 << 10}
	mix4k    = load{name: "mix4k-q32", depth: 32, block: 4 << 10, reads: 70}
	rr4kK    = load{name: "rr4k-q32-k", depth: 32, block: 4 << 10, reads: 100, kernel: true}
	rw4kK    = load{name: "rw4k-q32-k", depth: 32, block: 4 << 10, kernel: true}
	rr128k   = load{name: "rr128k-q16", depth: 16, block: 128 << 10, reads: 100}
	rw128k   = load{name: "rw128k-q16", depth: 16, block: 128 << 10}
	sr1m     = load{name: "sr1m-q8", depth: 8, block: 1 << 20, reads: 100, sequential: true}
	sr1mQ4   = load{name: "sr1m-q4", depth: 4, block: 1 << 20, reads: 100, sequential: true}
	sw1m     = load{name: "sw1m-q8", depth: 8, block: 1 << 20, sequential: true}
	rr4kX    = load{name: "rr4k-q32-x", depth: 32, block: 4 << 10, reads: 100, structured: true}
	rr128kX  = load{name: "rr128k-q16-x", depth: 16, block: 128 << 10, reads: 100, structured: true}
	er128kX  = load{name: "er128k-q16-x", depth: 16, block: 128 << 10, reads: 100, structured: true, empty: true}
	rr4kC4   = load{name: "rr4k-q32-c4", connections: 4, depth: 32, block: 4 << 10, reads: 100}
	rw4kC4   = load{name: "rw4k-q32-c4", connections: 4, depth: 32, block: 4 << 10}
	rr128kC4 = load{name: "rr128k-q16-c4", connections: 4, depth: 16, block: 128 << 10, reads: 100}
)

// A sample is one timed run of a load.
type sample struct {
	IOPS     float64 `json:"iops"`
	MBps     float64 `json:"mbps"` // 10⁶ bytes
	P50      float64 `json:"p50_us"`
	P99      float64 `json:"p99_us"`
	ServerUS float64 `json:"server_us"` // CPU time of the server for each request
	ClientUS float64 `json:"client_us"` // likewise of the client
	Others   float64 `json:"others"`    // of the processors that were to be used, those that others kept busy
	// Allocations, of the server or of a client in Go, for each request, where it tells.
	Allocations float64 `json:"allocations,omitempty"`
}

// A client runs loadgen, or another program with its flags, against servers.
type client struct {
	w           *workspace
	cpu         int   // to run on; negative: all
	apart       bool  // the server runs on another one
	space       int64 // bytes of the export that are used
	warm, timed time.Duration
}

// patience is what a run may take on top of its time; a server that hangs fails then.
const patience = 60 * time.Second

func (c client) loadgen(ctx context.Context, mode string, p *process, flags ...string) ([]byte, error) {
	return c.with(ctx, "loadgen", mode, p, flags...)
}

// with runs loadgen, or another program of the workspace with its flags.
func (c client) with(ctx context.Context, program, mode string, p *process, flags ...string) ([]byte, error) {
	argv := append([]string{c.w.path(program), mode, "-a", p.at.url(), "-n", p.export}, c.commonFlags(p)...)
	if p.tls {
		argv = append(argv, "-T", c.w.path("certificates"))
	}
	out, err := c.output(ctx, append(argv, flags...)...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", mode, err)
	}
	return out, nil
}

// output runs a program where clients run, and returns what it prints.
func (c client) output(ctx context.Context, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.warm+c.timed+patience)
	defer cancel()
	argv = pin(argv, c.cpu)
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, errors.New(strings.TrimSpace(string(exit.Stderr)))
	}
	return out, err
}

// commonFlags are those that all modes have.
func (c client) commonFlags(p *process) []string {
	counted := c.cpu
	if c.apart {
		counted = -1
	}
	return []string{
		"-p", strconv.Itoa(p.pid),
		"-S", strconv.FormatInt(c.space, 10),
		"-P", strconv.Itoa(counted),
	}
}

func (c client) timedFlags(l load) []string {
	return append(l.flags(), "-w", seconds(c.warm), "-d", seconds(c.timed))
}

// fill writes what verify and load expect to find. After large writes it has to be done again: what
// they leave has no mark where smaller requests look for one.
func (c client) fill(ctx context.Context, p *process) error {
	_, err := c.loadgen(ctx, "fill", p, "-b", "1048576", "-q", "4")
	return err
}

// verify fills, reads everything, and tries requests of many sizes.
func (c client) verify(ctx context.Context, p *process) error {
	if err := c.fill(ctx, p); err != nil {
		return err
	}
	return c.check(ctx, p)
}

// check is verify of what was filled before.
func (c client) check(ctx context.Context, p *process) error {
	_, err := c.loadgen(ctx, "verify", p, "-b", "131072", "-q", "8")
	return err
}

func (c client) run(ctx context.Context, p *process, l load) (sample, error) {
	return c.calm(func() (sample, error) { return c.runOnce(ctx, p, l) })
}

// calm takes a sample, or two if others used the processor meanwhile, and returns what was
// disturbed less. On all processors nobody is alone, and once is what there is.
func (c client) calm(take func() (sample, error)) (sample, error) {
	const tolerable, attempts = 0.12, 2
	best, err := take()
	for n := 1; n < attempts && err == nil && c.cpu >= 0 && best.Others > tolerable; n++ {
		var s sample
		if s, err = take(); s.Others < best.Others {
			best = s
		}
	}
	return best, err
}

func (c client) runOnce(ctx context.Context, p *process, l load) (sample, error) {
	l.structured = l.structured || p.structured
	return parseSample(c.loadgen(ctx, "load", p, c.timedFlags(l)...))
}

// parseSample reads what a load has printed.
func parseSample(out []byte, err error) (sample, error) {
	var s sample
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
