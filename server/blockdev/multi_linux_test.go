package blockdev_test

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// onCPU runs f on one processor, and so on the connection that the kernel has for it.
func onCPU(t *testing.T, cpu int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread, with its affinity, ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		err := unix.SchedSetaffinity(0, &set)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("processor %d: %v", cpu, err)
	}
}

// TestKernelMulti drives four connections from as many processors as there are: each connection
// must serve what its processor submits, and a flush over one must cover the writes over all.
func TestKernelMulti(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const connections, block, each = 4, 4096, 64
	used := min(connections, runtime.NumCPU())
	b := newRecorder(4 << 20)
	var mu sync.Mutex // guards durable
	durable := make([]byte, len(b.data))
	snapshot := func(op string, off int64) error {
		if op == "sync" {
			mu.Lock()
			defer mu.Unlock()
			b.mu.RLock()
			defer b.mu.RUnlock()
			copy(durable, b.data)
		}
		return nil
	}
	b.before.Store(&snapshot)
	d := connect(t, b, blockdev.Options{Connections: connections})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)

	offset := func(cpu, i int) int64 { return int64(cpu*each+i) * block }
	for cpu := range used {
		p, q := aligned(t, block), aligned(t, block)
		onCPU(t, cpu, func() {
			for i := range each {
				copy(p, bytes.Repeat([]byte{byte('a' + cpu)}, block))
				if _, err := f.WriteAt(p, offset(cpu, i)); err != nil {
					t.Error(err)
				}
				if _, err := f.ReadAt(q, offset(cpu, i)); err != nil || !bytes.Equal(p, q) {
					t.Errorf("processor %d reads block %d back changed: %v", cpu, i, err)
				}
			}
		})
	}
	stats := d.Stats()
	for i, st := range stats {
		t.Logf("connection %d: %d reads, %d writes", i, st.Read.Requests, st.Write.Requests)
		// Others of the machine may have read a little through another connection, and a thread may
		// have been moved before it was pinned; but this much can only have come from there.
		if i < used && (st.Write.Requests < each || st.Read.Requests < each) {
			t.Errorf("connection %d has served %d reads and %d writes, want %d and more of each",
				i, st.Read.Requests, st.Write.Requests, each)
		}
	}

	onCPU(t, used-1, func() {
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
	})
	// Over which one the kernel chooses; over no more than that.
	flushed := 0
	for i, st := range d.Stats() {
		if st.Flush.Requests > stats[i].Flush.Requests {
			flushed++
		}
	}
	if flushed != 1 {
		t.Errorf("%d connections got the flush", flushed)
	}
	mu.Lock()
	defer mu.Unlock()
	for cpu := range used {
		if n := bytes.Count(durable, []byte{byte('a' + cpu)}); n != each*block {
			t.Errorf("%d bytes that were written over connection %d were covered by the flush, want %d",
				n, cpu, each*block)
		}
	}
}

// TestKernelMultiFileSystem makes a file system, uses it, and has it checked.
func TestKernelMultiFileSystem(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d := connect(t, newRecorder(64<<20), blockdev.Options{Connections: min(4, runtime.NumCPU())})
	command(t, "mkfs.ext4", "-q", d.Path())
	dir := t.TempDir()
	for round := range 2 { // the second one sees what the first has written, not what the kernel has kept of it
		if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
			t.Fatalf("mount: %v", err)
		}
		for i := range 20 {
			content := bytes.Repeat([]byte{byte(i)}, 100_000+i)
			path := filepath.Join(dir, string(rune('a'+i)))
			if round == 0 {
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Error(err)
				}
			} else if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("file %d has changed, error %v", i, err)
			}
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatalf("unmount: %v", err)
		}
	}
	command(t, "fsck.ext4", "-f", "-n", d.Path())
}
