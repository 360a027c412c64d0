package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"sync"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// useMany has count devices at the same time, and ends them when use has returned for each.
func useMany(ctx context.Context, count int, use func(path string) error) (err error) {
	// Warm indexes make connects quick. By its name the pool knows what it had in an earlier
	// process.
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "example", Warm: 2})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	// What a process has left that was killed is dead, and keeps its index until somebody clears it
	// away.
	if _, err := pool.Reclaim(ctx); err != nil {
		log.Print(err) // It is in use still, or the kernel too old to say whose it is.
	}
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = useOne(ctx, pool, use) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// useOne has a device for as long as use runs.
func useOne(ctx context.Context, pool *blockdev.Pool, use func(path string) error) error {
	disk, err := memory.New(16<<20, memory.Options{})
	if err != nil {
		return err
	}
	dev, err := pool.Connect(ctx, disk, blockdev.Options{})
	if err != nil {
		return errors.Join(err, disk.Close())
	}
	// First the device, which writes what is cached, and gives its index back; then the disk, which
	// it needs for that.
	return errors.Join(use(dev.Path()), dev.Close(), disk.Close())
}

// A program with many devices takes them from a pool, side by side.
func ExamplePool() {
	err := useMany(context.Background(), 4, func(path string) error {
		fmt.Println(path)
		return os.WriteFile(path, []byte("one of many"), 0)
	})
	if err != nil {
		log.Fatal(err)
	}
}
