package file

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Every caller gets a sync that began after its call, one at a time, and callers
// share them.
func TestSyncsShare(t *testing.T) {
	const callers, calls = 8, 100
	var d durable
	var running, begun, ended atomic.Int64
	disk := func() error {
		if running.Add(1) > 1 {
			t.Error("two syncs at a time")
		}
		begun.Add(1)
		time.Sleep(100 * time.Microsecond) // a disk takes its time
		ended.Add(1)
		running.Add(-1)
		return nil
	}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for range calls {
				before := begun.Load()
				if err := d.sync(disk); err != nil || ended.Load() <= before {
					t.Errorf("%v: %d syncs had begun before, %d have ended", err, before, ended.Load())
				}
			}
		})
	}
	wg.Wait()
	if n := begun.Load(); n < calls || n >= callers*calls {
		t.Errorf("%d syncs for %d callers with %d calls each", n, callers, calls)
	}
}

// The kernel tells one of several callers of an error; ours all hear of it.
func TestSyncErrorStays(t *testing.T) {
	var d durable
	calls := 0
	once := func() error {
		time.Sleep(time.Millisecond)
		if calls++; calls == 1 {
			return syscall.EIO
		}
		return nil
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := d.sync(once); !errors.Is(err, syscall.EIO) {
				t.Errorf("%v, want EIO", err)
			}
		})
	}
	wg.Wait()
	if err := d.sync(once); !errors.Is(err, syscall.EIO) || calls != 1 {
		t.Errorf("later: %v after %d calls", err, calls)
	}
}

// An error that a sync of another kind is told of is told to no later one, so it stays, too.
func TestResizeErrorStays(t *testing.T) {
	var d durable
	if err := d.unshared(func() error { return syscall.EIO }); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want EIO", err)
	}
	for name, sync := range map[string]func(func() error) error{"sync": d.sync, "unshared": d.unshared} {
		if err := sync(func() error { return nil }); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s thereafter: %v, want EIO", name, err)
		}
	}
}

// device is a File in the place of a real one.
func device(t *testing.T, path string) *File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { f.Close() })
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	file := &File{f: f, raw: raw, path: path, unit: 1}
	file.size.Store(1 << 20)
	return file
}

// A character device takes writes and cannot sync.
func TestFUAErrorOfSyncStays(t *testing.T) {
	f := device(t, "/dev/null")
	f.durable.noFUA = true
	_, first := f.WriteAtFUA(make([]byte, 512), 0)
	if first == nil {
		t.Fatal("FUA write without sync succeeded")
	}
	if err := f.Sync(); err != first {
		t.Errorf("Sync: %v, want %v", err, first)
	}
	f.durable.noFUA = false
	if n, err := f.WriteAtFUA(make([]byte, 512), 0); n != 0 || err != first {
		t.Errorf("FUA write: %d, %v, want %v", n, err, first)
	}
	if _, err := f.WriteAt(make([]byte, 512), 0); err != nil {
		t.Errorf("plain write: %v", err)
	}
}

// A full device loses nothing that was promised.
func TestFUAErrorOfWritePasses(t *testing.T) {
	for _, noFUA := range []bool{false, true} {
		f := device(t, "/dev/full")
		f.durable.noFUA = noFUA
		if _, err := f.WriteAtFUA(make([]byte, 512), 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("no FUA %v: %v, want ENOSPC", noFUA, err)
		}
		if f.durable.err != nil {
			t.Errorf("no FUA %v: remembered %v", noFUA, f.durable.err)
		}
	}
}
