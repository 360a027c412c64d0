package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/testdata/bench/cputime"
)

const (
	warming = iota
	timed
	done
)

// phase is where the load is.
var phase atomic.Int32

// A sample is the result of a load, as loadgen has it.
type sample struct {
	IOPS        float64 `json:"iops"`
	MBps        float64 `json:"mbps"` // 10⁶ bytes
	P50         float64 `json:"p50_us"`
	P99         float64 `json:"p99_us"`
	ServerUS    float64 `json:"server_us"`
	ClientUS    float64 `json:"client_us"`
	Others      float64 `json:"others"`
	Allocations float64 `json:"allocations"` // for each request
}

// A run is what all workers share.
type run struct {
	c        *nbd.Client
	o        options
	blocks   int64
	salt     uint64
	position atomic.Int64 // of a sequential load, in blocks
	answered atomic.Bool  // a request was that counts
	began    time.Time
	ended    chan struct{} // closed when the workers of the load have ended
	err      error         // theirs, from then on
}

// A worker is a request in flight.
type worker struct {
	*run
	random    *rand.Rand
	p         []byte
	written   []int64 // offsets of the last writes
	requests  int     // counted
	latencies histogram
}

func newRun(c *nbd.Client, o options) (*run, error) {
	blocks := o.space / int64(o.block)
	if c.Size() < o.space || blocks == 0 {
		return nil, fmt.Errorf("the export has %d bytes", c.Size())
	}
	return &run{c: c, o: o, blocks: blocks, salt: rand.Uint64(), began: time.Now(), ended: make(chan struct{})}, nil
}

// each runs f in as many goroutines as there are to be requests in flight.
func (r *run) each(workers []*worker, f func(*worker) error) error {
	errs := make([]error, len(workers))
	var all sync.WaitGroup
	for i, w := range workers {
		all.Go(func() { errs[i] = f(w) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func (r *run) workers() []*worker {
	workers := make([]*worker, r.o.depth*r.o.connections)
	for i := range workers {
		w := &worker{run: r, random: rand.New(rand.NewPCG(r.salt, uint64(i))), p: make([]byte, r.o.block)}
		fillPattern(w.p, 0, r.salt)
		w.written = make([]int64, 0, mostWritten/len(workers)+1)
		workers[i] = w
	}
	return workers
}

// mostWritten is how many of the last writes are read back, of all workers.
const mostWritten = 256

// verify reads all that is used of the export.
func verify(c *nbd.Client, o options) error {
	r, err := newRun(c, o)
	if err != nil {
		return err
	}
	return r.each(r.workers(), func(w *worker) error {
		for {
			off := (w.position.Add(1) - 1) * int64(o.block)
			if off >= w.blocks*int64(o.block) {
				return nil
			}
			if _, err := c.ReadAt(w.p, off); err != nil {
				return err
			}
			if !isPattern(w.p, off, 0) {
				return wrong(off, o.block)
			}
		}
	})
}

func wrong(off int64, n int) error { return fmt.Errorf("wrong data at %d, length %d", off, n) }

// load is the timed run.
func load(c *nbd.Client, o options) (sample, error) {
	r, err := newRun(c, o)
	if err != nil {
		return sample{}, err
	}
	workers := r.workers()
	go func() {
		r.err = r.each(workers, (*worker).work)
		close(r.ended)
	}()
	s, err := r.measure(workers)
	if err != nil {
		return s, err
	}
	return s, r.each(workers, (*worker).readBack)
}

// measure has the workers pass through the phases.
func (r *run) measure(workers []*worker) (sample, error) {
	timer := time.NewTimer(seconds(r.o.warm))
	defer timer.Stop()
	r.wait(timer)
	stop, err := r.profile()
	if err != nil {
		return sample{}, err
	}
	before, err := r.used()
	if err != nil {
		return sample{}, err
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory) // It comes last: what is above allocates.
	allocated := memory.Mallocs
	phase.Store(timed)
	r.sleep(timer)
	phase.Store(done)
	runtime.ReadMemStats(&memory)
	after, err := r.used()
	stop()
	<-r.ended
	if err := errors.Join(err, r.err); err != nil {
		return sample{}, err
	}
	var n float64
	all := new(histogram)
	for _, w := range workers {
		n += float64(w.requests)
		all.add(&w.latencies)
	}
	if n == 0 {
		return sample{}, errors.New("no request was answered in time")
	}
	elapsed := after.at - before.at
	server, own := after.server-before.server, after.own-before.own
	others := max(0, after.all-before.all-server-own)
	return sample{
		IOPS:        n / elapsed.Seconds(),
		MBps:        n / elapsed.Seconds() * float64(r.o.block) / 1e6,
		P50:         microseconds(all.percentile(50)),
		P99:         microseconds(all.percentile(99)),
		ServerUS:    microseconds(server) / n,
		ClientUS:    microseconds(own) / n,
		Others:      others.Seconds() / elapsed.Seconds(),
		Allocations: float64(memory.Mallocs-allocated) / n,
	}, nil
}

// sleep sleeps for the timed part, unless the workers end. It goes on where nobody got a turn
// meanwhile, until somebody has.
func (r *run) sleep(timer *time.Timer) {
	const most = 30 * time.Second
	for began := time.Now(); ; {
		timer.Reset(seconds(r.o.timed))
		if !r.wait(timer) || r.answered.Load() || time.Since(began) > most {
			return
		}
	}
}

// wait waits for the timer, and reports false if the workers end before.
func (r *run) wait(timer *time.Timer) bool {
	select {
	case <-timer.C:
		return true
	case <-r.ended:
		return false
	}
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// profile begins a profile if one is wanted, and returns what ends it.
func (r *run) profile() (stop func(), err error) {
	if r.o.profile == "" {
		return func() {}, nil
	}
	f, err := os.Create(r.o.profile)
	if err != nil {
		return nil, err
	}
	return pprof.StopCPUProfile, pprof.StartCPUProfile(f)
}

// A mark is a moment with the CPU time that was used until then.
type mark struct{ at, server, own, all time.Duration }

func (r *run) used() (m mark, err error) {
	if m.all, err = cputime.Processor(r.o.cpu); err != nil {
		return m, err
	}
	if r.o.pid != 0 {
		if m.server, err = cputime.Of(r.o.pid); err != nil {
			return m, err
		}
	}
	m.own, err = cputime.Own()
	m.at = time.Since(r.began)
	return m, err
}

// work makes requests until phase is done.
func (w *worker) work() error {
	started := time.Since(w.began)
	for phase.Load() != done {
		off := w.choose()
		if err := w.request(off); err != nil {
			return err
		}
		now := time.Since(w.began)
		if phase.Load() == timed {
			w.requests++
			if w.requests == 1 {
				w.answered.Store(true)
			}
			w.latencies.count(now - started)
		}
		started = now
	}
	return nil
}

func (w *worker) choose() int64 {
	if w.o.sequential {
		return (w.position.Add(1) - 1) % w.blocks * int64(w.o.block)
	}
	return w.random.Int64N(w.blocks) * int64(w.o.block)
}

// request reads, or writes what readBack expects.
func (w *worker) request(off int64) error {
	if w.o.reads > 0 {
		_, err := w.c.ReadAt(w.p, off)
		if err == nil && !isPattern(w.p[:8], off, 0) {
			err = wrong(off, len(w.p))
		}
		return err
	}
	fillPattern(w.p[:8], off, 0)
	if len(w.written) == cap(w.written) {
		w.written = w.written[:copy(w.written, w.written[1:])]
	}
	w.written = append(w.written, off)
	_, err := w.c.WriteAt(w.p, off)
	return err
}

// readBack compares what was written last.
func (w *worker) readBack() error {
	for _, off := range slices.Backward(w.written) {
		if _, err := w.c.ReadAt(w.p, off); err != nil {
			return err
		}
		if !isPattern(w.p[:8], off, 0) || !isPattern(w.p[8:], 8, w.salt) {
			return fmt.Errorf("%w, which had been written", wrong(off, len(w.p)))
		}
	}
	return nil
}
