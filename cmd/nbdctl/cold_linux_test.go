package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A coldDisk answers no read while its gate is closed.
type coldDisk struct {
	store   *memory.Memory
	gate    sync.RWMutex // closed while it is locked
	waiting atomic.Int64 // reads before the gate
}

func (d *coldDisk) Size() int64 { return d.store.Size() }

func (d *coldDisk) ReadAt(p []byte, off int64) (int, error) {
	d.waiting.Add(1)
	d.gate.RLock()
	defer d.gate.RUnlock()
	d.waiting.Add(-1)
	return d.store.ReadAt(p, off)
}

func (d *coldDisk) WriteAt(p []byte, off int64) (int, error) { return d.store.WriteAt(p, off) }

// TestKernelColdFile shows, with default settings, that reads of an image that have to
// wait for its disk do not hold up those that the page cache can answer, on the same
// connection. The disk is a device of this test, whose gate is closed: the cold reads
// cannot end before it is opened, so nothing depends on how fast anything is.
func TestKernelColdFile(t *testing.T) {
	requireKernel(t)
	const size, hot, cold = 64 << 20, 1 << 20, 8
	store, err := memory.New(2*size, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	disk := &coldDisk{store: store}
	below, err := blockdev.Connect(t.Context(), disk, blockdev.Options{Timeout: 5 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer below.Close()
	mnt := t.TempDir()
	sh(t, "mkfs.ext4 -q "+below.Path()+"; mount -o noatime "+below.Path()+" "+mnt)
	defer sh(t, "umount "+mnt)
	image := filepath.Join(mnt, "disk.img")
	content := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	for i := 0; i < size; i += 4096 {
		content[i], content[i+1] = byte(i>>12), byte(i>>20)
	}
	clear(content[:64<<10]) // where the kernel might find a partition table
	if err := os.WriteFile(image, content, 0o600); err != nil {
		t.Fatal(err)
	}
	dev := connected(t, "file", image, "--timeout", "5m")
	defer must(t, "disconnect", dev)
	sh(t, "sync; echo 3 >/proc/sys/vm/drop_caches; head -c 1M "+image+" >/dev/null")

	disk.gate.Lock()
	open := sync.OnceFunc(disk.gate.Unlock)
	defer open()
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ended := make(chan error, cold)
	for i := range cold {
		n := 4096 << (5 * (i % 2)) // 4 KiB, 128 KiB
		off := size/4 + i<<22
		go func() {
			// A mapping is aligned, as O_DIRECT wants it.
			p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err == nil {
				_, err = unix.Pread(fd, p, int64(off))
			}
			if err == nil && !bytes.Equal(p, content[off:][:n]) {
				t.Errorf("%d bytes at %d: not what was written", n, off)
			}
			ended <- err
		}()
	}
	waiting := func() bool { return inFlight(t, dev) == cold && disk.waiting.Load() > 0 }
	eventually(t, waiting, "%d reads at the server, and some at the disk", cold)

	sh(t, "fio --minimal "+
		"--name=hot --filename="+dev+" --size=1M --ioengine=libaio --direct=1 "+
		"--iodepth=16 --rw=randread --bs=4k --loops=4 "+
		"--name=large --filename="+dev+" --stonewall --size=1M --ioengine=libaio --direct=1 "+
		"--iodepth=4 --rw=read --bs=128k --loops=4")
	sh(t, "dd if="+dev+" bs=64k count=16 iflag=direct status=none >/tmp/hot; head -c 1M "+image+" | cmp - /tmp/hot")
	if n := inFlight(t, dev); n != cold || len(ended) != 0 {
		t.Errorf("%d cold reads have ended before their disk has answered, %d are in flight", len(ended), n)
	}
	open()
	for range cold {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// inFlight is how many requests the server of a device has not answered.
func inFlight(t *testing.T, dev string) int {
	t.Helper()
	var stats struct {
		Total struct {
			InFlight int `json:"in_flight"`
		} `json:"total"`
	}
	if err := json.Unmarshal([]byte(must(t, "stats", "--json", dev)), &stats); err != nil {
		t.Fatal(err)
	}
	return stats.Total.InFlight
}
