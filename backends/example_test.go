package backends_test

import (
	"fmt"
	"sync"

	"github.com/nbdctl/nbdctl/backends"
)

// A Disk is twenty lines of Go that can be attached as a block device.
type Disk struct {
	mu   sync.RWMutex // guards data
	data []byte
}

func (d *Disk) Size() int64 { return int64(len(d.data)) }

func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return copy(p, d.data[off:]), nil
}

func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *Disk) Trim(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off:][:n])
	return nil
}

func ExampleProbe() {
	dev := backends.Probe(&Disk{data: make([]byte, 1<<20)})
	fmt.Println(dev.Size(), "bytes:", dev.Caps)
	if dev.Syncer == nil {
		fmt.Println("a write is as durable as it will ever be when it returns")
	}
	// Output:
	// 1048576 bytes: write,trim
	// a write is as durable as it will ever be when it returns
}
