package blockdev_test

import (
	"context"
	"errors"
	"io"
	"log"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// move puts an image in the place of the disk of a device in use. Who uses it notices nothing but a
// pause.
func move(ctx context.Context, dev *blockdev.Device, disk backends.Backend, path string) (*file.File, error) {
	image, err := file.Open(path, file.Options{Create: true, Size: disk.Size()})
	if err != nil {
		return nil, err
	}
	// The old disk gets no further request while the function runs, and the new one all that come
	// after it. Requests wait meanwhile, so a large disk is mirrored before, and changed by Swap
	// when the mirror has caught up.
	err = dev.SwapFunc(ctx, func(context.Context) (backends.Backend, error) {
		from := io.NewSectionReader(disk, 0, disk.Size())
		if _, err := io.Copy(io.NewOffsetWriter(image, 0), from); err != nil {
			return nil, err // The old disk stays.
		}
		return image, image.Sync() // What the kernel was told is durable has to stay so.
	})
	if err != nil {
		return nil, errors.Join(err, image.Discard())
	}
	return image, nil
}

// A device begins in memory and goes on in a file.
func ExampleDevice_SwapFunc() {
	ctx := context.Background()
	disk, err := memory.New(16<<20, memory.Options{})
	if err != nil {
		log.Fatal(err)
	}
	dev, err := blockdev.Connect(ctx, disk, blockdev.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(dev.Path(), []byte("in memory"), 0); err != nil {
		log.Print(err)
	}
	image, err := move(ctx, dev, disk, "disk.img")
	if err != nil {
		log.Print(err) // The device goes on as it was.
		if err := errors.Join(dev.Close(), disk.Close()); err != nil {
			log.Print(err)
		}
		return
	}
	if err := disk.Close(); err != nil { // Nothing uses it any more.
		log.Print(err)
	}
	if err := os.WriteFile(dev.Path(), []byte("in a file"), 0); err != nil {
		log.Print(err)
	}
	if err := errors.Join(dev.Close(), image.Close()); err != nil {
		log.Print(err)
	}
}
