package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"sync"

	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A disk is all that a block device takes: a range of bytes that can be read and written.
type disk struct {
	mu   sync.RWMutex
	data []byte
}

func (d *disk) Size() int64 { return int64(len(d.data)) }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return copy(p, d.data[off:]), nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *disk) Sync() error { return nil } // Memory does not get more durable than this.

func (d *disk) Trim(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	return nil
}

// serve makes a block device of a disk for as long as use runs.
func serve(ctx context.Context, d *disk, use func(path string) error) error {
	dev, err := blockdev.Connect(ctx, d, blockdev.Options{})
	if err != nil {
		return err
	}
	return errors.Join(use(dev.Path()), dev.Close()) // Close flushes, disconnects, and waits until the device has gone.
}

// A type of your own becomes a block device: anything can use it then, mkfs and mount among them.
func Example() {
	err := serve(context.Background(), &disk{data: make([]byte, 64<<20)}, func(path string) error {
		fmt.Println("mkfs.ext4", path)
		return os.WriteFile(path, []byte("hello, kernel"), 0)
	})
	if err != nil {
		log.Fatal(err)
	}
}
