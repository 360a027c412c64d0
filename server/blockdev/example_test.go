package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
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

// A program that was killed finds what it had, decides what becomes of each device, and clears away
// the rest.
func ExamplePool_Left() {
	ctx := context.Background()
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "example"})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	left, err := pool.Left(ctx)
	if err != nil {
		log.Print(err) // Of some it can't be told; the others are there.
	}
	var indexes []int
	for _, s := range left {
		indexes = append(indexes, s.Index)
	}
	users, err := holder.FindAll(ctx, indexes...)
	if err != nil {
		log.Print(err)
	}
	for _, s := range left {
		fmt.Println(nbdnl.Path(s.Index), s.Identifier, s.Size, s.State, users[s.Index])
	}
	if _, err := pool.Reclaim(ctx); err != nil {
		log.Print(err) // What somebody uses stays.
	}
}

// A program that ends takes no new device, and waits for a while for those who still have one.
func ExamplePool_Wait() {
	pool, err := blockdev.NewPool(blockdev.PoolOptions{
		Name:    "example",
		Warm:    4,
		OnError: func(err error) { log.Print(err) },
	})
	if err != nil {
		log.Fatal(err)
	}
	// …
	if err := pool.Close(); err != nil {
		log.Print(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := pool.Wait(ctx); err != nil {
		log.Print(err, pool.Stats())
	}
}
