package blockdev_test

import (
	"context"
	"io"
	"log"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// snapshot copies the disk behind a device that is in use. The copy is as a power cut would have
// left the disk; a file system that must not have to recover is frozen (fsfreeze) meanwhile.
func snapshot(ctx context.Context, dev *blockdev.Device, disk backends.Backend, to io.Writer) error {
	// What programs have written may be in the kernel's cache still, without Flush. An error also
	// says that writes were lost earlier, which the snapshot would lack.
	if err := dev.Flush(ctx); err != nil {
		return err
	}
	// No request is executed while the function runs: the copy is of one moment. The device goes on
	// with the disk that it had.
	return dev.SwapFunc(ctx, func(ctx context.Context) (backends.Backend, error) {
		// Requests wait meanwhile, for half of Options.Timeout at the most, when ctx ends. A disk
		// that takes longer has snapshots of its own, and this would be the place to ask for one.
		for off := int64(0); off < disk.Size() && ctx.Err() == nil; off += 1 << 20 {
			piece := io.NewSectionReader(disk, off, min(1<<20, disk.Size()-off))
			if _, err := io.Copy(to, piece); err != nil {
				return nil, err
			}
		}
		return disk, context.Cause(ctx)
	})
}

// A snapshot of a device in use has all that was written before.
func ExampleDevice_Flush() {
	ctx := context.Background()
	disk, err := memory.New(16<<20, memory.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	dev, err := blockdev.Connect(ctx, disk, blockdev.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(dev.Path(), []byte("to be kept"), 0); err != nil {
		log.Print(err)
	}
	if err := snapshot(ctx, dev, disk, os.Stdout); err != nil {
		log.Print(err)
	}
	if err := dev.Close(); err != nil {
		log.Print(err)
	}
}
