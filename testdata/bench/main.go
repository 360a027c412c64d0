// Bench measures nbdctl beside the floor and its peers, and prints tables; make bench runs it.
//
// Servers run side by side and take turns, round by round, so that what disturbs the machine
// disturbs all of them alike; what counts are the medians of the ratios of each round. Before and
// after the timed rounds every server has to give back what was written to it, and in them every
// reply is checked: one that fails has no numbers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

type options struct {
	wanted *regexp.Regexp
	cpu    int
	out    string
	tree   string
	base   string
	rounds int
	// warm and timed are the parts of a run that do not count and that do.
	warm, timed time.Duration
	// space, in bytes, is what is used of each export.
	space int64
	// alternations and fio are the rounds of the kernel's devices, and the time of each of their
	// loads.
	alternations int
	fio          time.Duration
}

func main() {
	log.SetFlags(0)
	o := options{
		rounds:       7,
		warm:         50 * time.Millisecond,
		timed:        150 * time.Millisecond,
		space:        512 << 20,
		alternations: 3,
		fio:          400 * time.Millisecond,
	}
	quick := flag.Bool("quick", false, "short rounds and few of them: to see that it works, not to compare")
	cases := flag.String("cases", "", "`regexp` of the cases to run, such as memory/rr4k; default: all")
	inside := flag.String("inside", "", "be the part that runs in a kernel with nbd, and write to `file`")
	address := flag.String("attack", "", "attack the server at `address` until stdin ends, and do nothing else")
	rounds := flag.Int("rounds", 0, "rounds of each case, instead of the usual number")
	flag.StringVar(&o.base, "base", "",
		"`directory` of an earlier commit of the repository, to be measured beside this one instead of the peers")
	flag.DurationVar(&o.fio, "fio", o.fio, "time of each load inside")
	flag.IntVar(&o.cpu, "cpu", 0, "processor of the pinned suites")
	flag.StringVar(&o.out, "out", ".bin/bench", "`directory` for programs, images and results; on a disk")
	flag.StringVar(&o.tree, "tree", ".", "`directory` of the repository")
	flag.Parse()
	if *quick {
		o.rounds, o.warm, o.timed, o.space = 3, 40*time.Millisecond, 80*time.Millisecond, 128<<20
		o.alternations, o.fio = 1, 100*time.Millisecond
	}
	if *rounds > 0 || *inside != "" {
		o.rounds = *rounds
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := errors.Join(adoptOrphans(), o.resolve(*cases))
	switch {
	case err != nil:
	case *address != "":
		err = attackHere(*address)
	case *inside != "":
		err = measureInside(ctx, o, *inside)
	default:
		err = measure(ctx, o, *quick)
	}
	if err != nil {
		log.Print("bench: ", err)
		stop()
		os.Exit(1)
	}
}

func (o *options) resolve(cases string) error {
	var err error
	if o.wanted, err = regexp.Compile(cases); err != nil {
		return err
	}
	if o.out, err = filepath.Abs(o.out); err != nil {
		return err
	}
	if o.base != "" {
		if o.base, err = filepath.Abs(o.base); err != nil {
			return err
		}
	}
	o.tree, err = filepath.Abs(o.tree)
	return err
}

// measure runs what is wanted, and leaves its results in o.out.
func measure(ctx context.Context, o options, quick bool) (err error) {
	rep := report{Machine: thisMachine(), Quick: quick, Rounds: o.rounds}
	began := time.Now()
	w, err := newWorkspace(ctx, o.tree, o.base, o.out)
	if w != nil {
		defer func() { err = errors.Join(err, w.remove()) }()
	}
	if err != nil {
		return err
	}
	all := suites()
	if o.base != "" {
		all = baseSuites()
	}
	for _, s := range all {
		if s = s.selected(o.wanted); len(s.loads) == 0 {
			continue
		}
		results, err := runSuite(ctx, s, o, w)
		if err != nil {
			return err
		}
		rep.Results = append(rep.Results, results...)
	}
	clients, err := measureClients(ctx, o, w)
	if err != nil {
		return err
	}
	rep.Results = append(rep.Results, clients...)
	if o.base != "" {
		rep.Seconds = time.Since(began).Seconds()
		return rep.write(o.out, os.Stdout)
	}
	if o.wanted.MatchString("idle") {
		if rep.Idle, err = measureIdle(ctx, o, w); err != nil {
			return err
		}
	}
	if o.wanted.MatchString(hostileCase) {
		hostile, err := measureHostile(ctx, o, w)
		if err != nil {
			return err
		}
		rep.Results = append(rep.Results, hostile...)
	}
	kernel, err := measureKernel(ctx, o, w)
	if err != nil {
		return err
	}
	rep.Results = append(rep.Results, kernel...)
	rep.Goals = judge(rep.Results)
	rep.Seconds = time.Since(began).Seconds()
	return rep.write(o.out, os.Stdout)
}

// write prints the tables, and leaves them in dir beside the JSON and the chart.
func (r *report) write(dir string, out io.Writer) error {
	text, err := os.Create(filepath.Join(dir, "table.txt"))
	if err != nil {
		return err
	}
	defer text.Close()
	if err := r.print(io.MultiWriter(out, text)); err != nil {
		return err
	}
	if err := r.writeJSON(filepath.Join(dir, "results.json")); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "chart.svg"), chart(r.Results), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s has table.txt, results.json and chart.svg\n", dir)
	return r.failure()
}
