package server_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

const (
	ledgerRole = "NBD_TEST_LEDGER_ROLE" // of the process that is killed
	ledgerSize = 1 << 20                // of its disk, in bytes
	ledgerUnit = 4 << 10                // of what the clients keep account
)

// shared is a disk in memory that outlives the process.
type shared []byte

func (s shared) Size() int64                              { return int64(len(s)) }
func (s shared) ReadAt(p []byte, off int64) (int, error)  { return copy(p, s[off:]), nil }
func (s shared) WriteAt(p []byte, off int64) (int, error) { return copy(s[off:], p), nil }

// lending is one that takes data, and gives them, where they are.
type lending struct{ shared }

func (s lending) ReadAtTo(w backends.Reply, off int64, n int) error {
	w.Bytes(s.shared[off:][:n])
	return nil
}

func (s lending) WriteAtFrom(r backends.Payload, off int64, n int) error {
	return r.Into(s.shared[off:][:n])
}

// lazy is one that takes its time.
type lazy struct{ shared }

func (s lazy) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(rand.N(300 * time.Microsecond))
	return s.shared.ReadAt(p, off)
}

func (s lazy) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(rand.N(300 * time.Microsecond))
	return s.shared.WriteAt(p, off)
}

var ledgerBackends = map[string]func(shared) backends.Backend{
	"inline":  func(s shared) backends.Backend { return lending{s} },
	"workers": func(s shared) backends.Backend { return lazy{s} },
}

// memoryFile makes a file in memory.
func memoryFile(t *testing.T, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func mapShared(t *testing.T, f *os.File, size int) []byte {
	t.Helper()
	p, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(p) })
	return p
}

func mapWord(t *testing.T, f *os.File) *atomic.Uint32 {
	t.Helper()
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.MunmapPtr(p, 4096) })
	return (*atomic.Uint32)(p)
}

// TestLedgerProcess is the process that is killed.
func TestLedgerProcess(t *testing.T) {
	make := ledgerBackends[os.Getenv(ledgerRole)]
	if make == nil {
		return // This is not the child.
	}
	nc, err := net.FileConn(os.NewFile(3, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	disk := mapShared(t, os.NewFile(4, "disk"), ledgerSize)
	conn := export(t, make(disk), server.Options{}).NewConn(nc, nil)
	conn.SetLedger(mapWord(t, os.NewFile(5, "ledger")))
	conn.Transmit() // until the end of the process
}

// startLedger has another process serve a socket.
func startLedger(t *testing.T, role string, files ...*os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestLedgerProcess$")
	cmd.Env = append(os.Environ(), ledgerRole+"="+role)
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// TestLedgerKilled kills a process that serves a socket, of which it has a copy, at random moments
// of a load. Where the connection stood still, it goes on serving the socket as it is: each request
// is answered once, and the disk has what was written to it. NBD_TEST_KILLS says how often.
func TestLedgerKilled(t *testing.T) {
	rounds := 20
	if n, err := strconv.Atoi(os.Getenv("NBD_TEST_KILLS")); err == nil {
		rounds = n
	}
	for _, role := range []string{"inline", "workers"} {
		for _, depth := range []int{0, 1, 4, 32} {
			t.Run(fmt.Sprint(role, " ", depth), func(t *testing.T) {
				still, answered := 0, 0
				for range rounds {
					ok, n := killLedger(t, role, depth)
					if ok {
						still++
					}
					answered += n
				}
				t.Logf("of %d killed with %d requests in flight, %d stood still; %d were answered",
					rounds, depth, still, answered)
				if depth == 0 && still < rounds {
					t.Error("not all that were idle stood still")
				}
			})
		}
	}
}

// killLedger kills one, and goes on with the socket if it stood still. answered is how many
// requests were, by either.
func killLedger(t *testing.T, role string, depth int) (still bool, answered int) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "client"), os.NewFile(uintptr(pair[1]), "server")
	defer theirs.Close()
	nc, err := net.FileConn(ours)
	if err := errors.Join(err, ours.Close()); err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	disk, page := memoryFile(t, ledgerSize), memoryFile(t, 4096)
	word := mapWord(t, page)
	cmd := startLedger(t, role, theirs, disk, page)
	c := newClient(t, nc)
	c.expect(0, call{op: cmdRead, length: 512})

	var load sync.WaitGroup
	var count, quota atomic.Int64 // requests that were answered, and from when on no more are made
	quota.Store(1 << 60)
	for i := range depth {
		load.Go(func() {
			units := ledgerSize / ledgerUnit / depth
			a := account{client: c, first: i * units, versions: make([]uint64, units)}
			for count.Load() < quota.Load() && a.one() {
				count.Add(1)
			}
		})
	}
	if depth == 0 {
		settles(t, word, 0, "idle")
	}
	moment := time.NewTimer(rand.N(20 * time.Millisecond))
	<-moment.C
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // All its threads are dead.
	before := count.Load()
	if still = word.Load() == 0; !still {
		unix.Shutdown(pair[1], unix.SHUT_RDWR)
		load.Wait()
		return false, int(before)
	}
	next, err := net.FileConn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	conn := export(t, ledgerBackends[role](mapShared(t, disk, ledgerSize)), server.Options{}).NewConn(next, nil)
	result := make(chan error, 1)
	go func() { result <- conn.Transmit() }()
	quota.Store(before + 200)
	load.Wait()
	if depth > 0 && count.Load() < quota.Load() {
		t.Errorf("a request is not answered: %d were, and %d before", count.Load(), before)
	}
	c.expect(0, call{op: cmdRead, length: 512})
	nc.Close()
	<-result
	return true, int(count.Load())
}

// An account is a client's of a part of the disk, one request at a time.
type account struct {
	*client
	first    int      // unit
	versions []uint64 // of the units, what was written last
}

// one makes a random request, and holds that the answer is right. It returns false when nobody
// answers any more.
func (a *account) one() bool {
	n := 1
	if rand.IntN(8) == 0 {
		n += rand.IntN(min(64, len(a.versions)))
	}
	at := rand.IntN(len(a.versions) - n + 1)
	units := a.versions[at : at+n]
	write := rand.IntN(2) == 0
	if write {
		for i := range units {
			units[i] = rand.Uint64()
		}
	}
	var data []byte
	for i, version := range units {
		data = append(data, content(a.first+at+i, version)...)
	}
	q := call{op: cmdRead, offset: uint64(a.first+at) * ledgerUnit, length: uint32(len(data))}
	if write {
		q.op, q.data = cmdWrite, data
	}
	p, ok := <-a.start(q)
	if !ok {
		return false
	}
	if p.errno != 0 {
		a.t.Errorf("op %d at %d: error %d", q.op, q.offset, p.errno)
	}
	if !write && !bytes.Equal(p.data, data) {
		a.t.Errorf("%d bytes at %d are not what was written last", q.length, q.offset)
	}
	return true
}

// content is what a unit has of a version; 0: nothing was written.
func content(unit int, version uint64) []byte {
	p := make([]byte, ledgerUnit)
	if version != 0 {
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], version^uint64(unit)<<32^uint64(i))
		}
	}
	return p
}
