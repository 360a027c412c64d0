// Pool does what programs do that carry a device pool of their own around: it attaches a disk with
// four connections, has a command use it, flushes, takes a snapshot under the running device, and
// detaches. What a run that was killed has left, it takes back first.
//
//	pool COMMAND [ARG...]
//
// The command gets the device's path as its last argument; the snapshot goes to standard output.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const size = 16 << 20

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, command []string) (err error) {
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: "pool-example", Warm: 4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	if _, err := pool.Reclaim(ctx); err != nil {
		log.Print(err) // What is in use still can be reclaimed another time.
	}
	disk, err := memory.New(size, memory.Options{})
	if err != nil {
		return err
	}
	dev, err := pool.Connect(ctx, disk, blockdev.Options{Connections: 4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close(), disk.Close()) }()
	if err := exec.CommandContext(ctx, "env", append(command, dev.Path())...).Run(); err != nil {
		return err
	}
	if err := dev.Flush(ctx); err != nil {
		return err
	}
	return dev.SwapFunc(ctx, func(context.Context) (backends.Backend, error) { // Nothing is written while it copies.
		_, err := io.Copy(os.Stdout, io.NewSectionReader(disk, 0, size))
		return disk, err
	})
}
