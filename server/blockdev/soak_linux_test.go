package blockdev_test

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const (
	// soakRoundsEnv sets how many devices TestKernelSoak makes, however long that takes. Otherwise
	// it makes soakRounds, or as many as it can in soakTime: they take ten times as long on a
	// machine that is slow at page faults.
	soakRoundsEnv = "NBD_TEST_SOAK_ROUNDS"
	soakRounds    = 200
	soakTime      = 80 * time.Second
	soakWorkers   = 3
	// soakSize is that of each device, in bytes.
	soakSize = 1 << 20
	// soakSlack is how much more memory may be in use after the soak than before, in bytes.
	soakSlack = 4 << 20
)

// TestKernelSoak makes and ends many devices, in several ways at once, while other programs do the
// same by netlink and by ioctls. Nobody's bytes may change, and nothing may be left in the end.
func TestKernelSoak(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for _, name := range []string{"nbd-client", "qemu-nbd"} {
		if _, err := exec.LookPath(name); err != nil && os.Getenv("NBD_TEST_REQUIRE") != "1" {
			t.Skip(err) // where it is required, the test fails for want of strangers
		}
	}
	rounds, limit := soakRounds, soakTime
	if env := os.Getenv(soakRoundsEnv); env != "" {
		var err error
		if rounds, err = strconv.Atoi(env); err != nil {
			t.Fatalf("%s: %v", soakRoundsEnv, err)
		}
		limit = math.MaxInt64
	}
	// What one page of a huge one needs counts for all of it, in which a leak would not be found.
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	first := newSoak(t) // makes whatever is made once and kept
	first.round(rand.New(rand.NewPCG(0, 0)), 0)
	first.close()
	before := takeStock(t)
	s := newSoak(t)
	s.run(rounds, limit)
	s.close()
	s.report()
	before.compare(t)
}

// A soak is one run of the test.
type soak struct {
	*testing.T
	client     *nbdnl.Client
	prefix     string // of the identifiers of our devices
	identified bool   // the kernel shows them

	mu      sync.Mutex                 // guards what follows
	took    map[string][]time.Duration // by what it was
	indexes int                        // rounds with an index of their own
	busy    int                        // indexes that somebody else had taken
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	return &soak{
		T: t, client: c, prefix: nbdnl.NewIdentifier("soak"), identified: nbdnltest.Identifiers.In(t),
		took: make(map[string][]time.Duration),
	}
}

func (s *soak) close() {
	if err := s.client.Close(); err != nil {
		s.Error(err)
	}
}

// run does all rounds, or those that are begun before limit is over, and lets the strangers do
// theirs meanwhile.
func (s *soak) run(rounds int, limit time.Duration) {
	before, dir := s.connected(), s.TempDir()
	srv, listener := s.serve(filepath.Join(dir, "socket"))
	strangers := []*stranger{
		netlinkClient(s.T, srv, listener), ioctlClient(s.T, srv, listener), qemuNBD(s.T, filepath.Join(dir, "image")),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()

	stop := make(chan struct{})
	var others, ours sync.WaitGroup
	for i, o := range strangers {
		others.Go(func() { o.churn(s.T, rand.New(rand.NewPCG(2, uint64(i))), stop) })
	}
	began := time.Now()
	var next, done atomic.Int64
	for i := range soakWorkers {
		rng := rand.New(rand.NewPCG(1, uint64(i)))
		ours.Go(func() {
			for n := next.Add(1); n <= int64(rounds) && time.Since(began) < limit && !s.Failed(); n = next.Add(1) {
				s.round(rng, int(n))
				done.Add(1)
			}
		})
	}
	ours.Wait()
	close(stop)
	others.Wait()
	if err := srv.Shutdown(s.Context()); err != nil {
		s.Error(err)
	}
	if err := <-served; !errors.Is(err, server.ErrServerClosed) {
		s.Error(err)
	}
	s.Logf("%d rounds of %d", done.Load(), rounds)
	for _, o := range strangers {
		s.Logf("%s: %d rounds verified, %d attaches lost to somebody else", o.name, o.verified, o.lost)
		if o.verified < max(3, int(done.Load())/40) {
			s.Errorf("%s has come to no more than %d rounds", o.name, o.verified)
		}
		o.close()
	}
	s.wantGone(before)
	if err := os.RemoveAll(dir); err != nil {
		s.Error(err)
	}
}

// serve makes the server that nbd-client connects to.
func (s *soak) serve(path string) (*server.Server, net.Listener) {
	l, err := net.Listen("unix", path)
	if err != nil {
		s.Fatal(err)
	}
	return &server.Server{Exports: make(map[string]*server.Export)}, l
}

// round makes one device, uses it, and ends it.
func (s *soak) round(rng *rand.Rand, n int) {
	m, err := memory.New(soakSize, memory.Options{})
	if err != nil {
		s.Error(err)
		return
	}
	defer m.Close()
	o := blockdev.Options{
		Client: s.client, Connections: 1 + rng.IntN(4), Identifier: s.prefix + "-" + strconv.Itoa(n),
	}
	start := time.Now()
	d, err := s.connect(rng, m, o)
	if err != nil {
		s.Errorf("round %d: %v", n, err)
		return
	}
	s.note("connect", start)
	s.use(rng, d, m)
	start = time.Now()
	if n%2 == 0 {
		err = d.Disconnect(s.Context())
		s.note("disconnect", start)
		err = errors.Join(err, d.Close()) // does nothing
	} else {
		err = d.Close()
		s.note("close", start)
	}
	if err := errors.Join(err, d.Err()); err != nil {
		s.Errorf("round %d, end of %s: %v", n, d.Path(), err)
	}
}

// note keeps how long something took.
func (s *soak) note(what string, since time.Time) {
	took := time.Since(since)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.took[what] = append(s.took[what], took)
}

// connect makes a device, every fourth with an index that may be taken.
func (s *soak) connect(rng *rand.Rand, m *memory.Memory, o blockdev.Options) (*blockdev.Device, error) {
	for rng.IntN(4) == 0 {
		d, err := blockdev.ConnectIndex(s.Context(), rng.IntN(maxStrangerIndex), m, o)
		s.mu.Lock()
		s.indexes++
		if errors.Is(err, nbdnl.ErrBusy) {
			s.busy++
		}
		s.mu.Unlock()
		if !errors.Is(err, nbdnl.ErrBusy) {
			return d, err
		}
	}
	return blockdev.Connect(s.Context(), m, o)
}

// use writes, reads, and looks at what has arrived.
func (s *soak) use(rng *rand.Rand, d *blockdev.Device, m *memory.Memory) {
	f, err := os.OpenFile(d.Path(), os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		s.Error(err)
		return
	}
	defer f.Close()
	const n = 64 << 10
	p, free := directBuffer(s.T, n)
	defer free()
	want, stored := make([]byte, n), make([]byte, n)
	fill(rng, want)
	copy(p, want)
	offset := rng.Int64N(soakSize/n) * n
	_, writeErr := f.WriteAt(p, offset)
	clear(p)
	_, readErr := f.ReadAt(p, offset)
	_, storedErr := m.ReadAt(stored, offset)
	err = errors.Join(writeErr, readErr, storedErr)
	if err != nil || !bytes.Equal(p, want) || !bytes.Equal(stored, want) {
		s.Errorf("%s: what was written is read: %t, is in the backend: %t, error %v",
			d.Path(), bytes.Equal(p, want), bytes.Equal(stored, want), err)
	}
	identifier := ""
	if s.identified {
		identifier = d.Identifier()
	}
	st, err := s.client.Status(s.Context(), d.Index())
	if err != nil || st.Identifier != identifier || st.State != nbdnl.StateLive {
		s.Errorf("%s is %+v, error %v, want it live and ours", d.Path(), st, err)
	}
}

// connected returns the devices that are connected, whosever they are.
func (s *soak) connected() []nbdnl.Status {
	s.Helper()
	devices, err := s.client.Devices(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	return slices.DeleteFunc(devices, func(st nbdnl.Status) bool { return !st.Connected() })
}

// wantGone checks that no device is connected that was not before.
func (s *soak) wantGone(before []nbdnl.Status) {
	s.Helper()
	old := func(st nbdnl.Status) bool { return slices.Contains(before, st) }
	left := slices.DeleteFunc(s.connected(), old)
	deadline := time.Now().Add(10 * time.Second)
	for len(left) > 0 && time.Now().Before(deadline) {
		<-time.After(10 * time.Millisecond)
		left = slices.DeleteFunc(s.connected(), old)
	}
	if len(left) > 0 {
		s.Errorf("still connected: %+v", left)
	}
}

func (s *soak) report() {
	for what, took := range s.took {
		slices.Sort(took)
		s.Logf("%d times %s: median %v, worst %v", len(took), what, took[len(took)/2], took[len(took)-1])
	}
	s.Logf("%d asked for an index of which %d were taken", s.indexes, s.busy)
}

// A stock is what a process uses of its machine.
type stock struct {
	descriptors, goroutines int
	heap, resident, shared  int // bytes
}

func takeStock(t *testing.T) stock {
	t.Helper()
	runtime.GC() // what is pooled goes with the second
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return stock{
		descriptors: len(fds),
		goroutines:  runtime.NumGoroutine(),
		heap:        int(m.HeapAlloc),
		resident:    kibis(t, "/proc/self/status", "VmRSS:"),
		shared:      kibis(t, "/proc/meminfo", "Shmem:"),
	}
}

// kibis reads a line such as "VmRSS:  1234 kB" and returns bytes.
func kibis(t *testing.T, path, name string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == name {
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("%s has no %s", path, name)
	return 0
}

// compare fails the test if more is in use now. What was just let go of has a moment to disappear.
func (before stock) compare(t *testing.T) {
	t.Helper()
	now := takeStock(t)
	deadline := time.Now().Add(5 * time.Second)
	for before.exceeded(now) && time.Now().Before(deadline) {
		<-time.After(50 * time.Millisecond)
		now = takeStock(t)
	}
	t.Logf("before: %+v", before)
	t.Logf("after:  %+v", now)
	if before.exceeded(now) {
		t.Error("something is left behind")
	}
}

func (before stock) exceeded(now stock) bool {
	return now.descriptors > before.descriptors ||
		now.goroutines > before.goroutines ||
		now.heap > before.heap+soakSlack ||
		now.resident > before.resident+2*soakSlack ||
		now.shared > before.shared+soakSlack
}
