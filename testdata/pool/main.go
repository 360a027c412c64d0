// Pool does what programs do that carry a device pool of their own around: it attaches a disk with
// four connections, has a command use it, flushes, takes a snapshot under the running device, and
// detaches. The device of a run that was killed it serves again: who used that has merely waited.
//
//	pool IMAGE COMMAND [ARG...]
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
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

const (
	name = "pool-example"
	size = 16 << 20
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, image string, command []string) (err error) {
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: name, Warm: 4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	disk, err := file.Open(image, file.Options{Create: true, Size: size})
	if err != nil {
		return err
	}
	dev, err := device(ctx, pool, disk, name+":"+image)
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

// device serves again what an earlier run has left of that identifier, or else connects a new
// device.
func device(ctx context.Context, p *blockdev.Pool, disk backends.Backend, id string) (*blockdev.Device, error) {
	o := blockdev.Options{Identifier: id, Connections: 4, Timeout: 5 * time.Second, DeadTimeout: time.Minute}
	left, err := p.Left(ctx)
	for _, s := range left {
		if s.Identifier == id {
			return p.Attach(ctx, s, disk, o)
		}
	}
	if err != nil {
		log.Print(err) // A new device can be had all the same.
	}
	return p.Connect(ctx, disk, o)
}
