package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/nbdctl/nbdctl/backends/buse"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A driver has the methods that the library buse-go asks for. It stays as it is.
type driver struct{ data []byte }

func (d *driver) ReadAt(p []byte, off uint) error {
	copy(p, d.data[off:])
	return nil
}

func (d *driver) WriteAt(p []byte, off uint) error {
	copy(d.data[off:], p)
	return nil
}

func (d *driver) Flush() error                { return nil }
func (d *driver) Trim(off, length uint) error { return nil }
func (d *driver) Disconnect()                 { fmt.Println("disconnected") }

// attach is what a program does instead of CreateDevice, Connect and Disconnect of that library.
func attach(ctx context.Context, d *driver, use func(path string) error) error {
	disk, err := buse.New(d, int64(len(d.data)))
	if err != nil {
		return err
	}
	dev, err := blockdev.Connect(ctx, disk, blockdev.Options{}) // or ConnectIndex
	if err != nil {
		return errors.Join(err, disk.Close())
	}
	return errors.Join(use(dev.Path()), dev.Close(), disk.Close())
}

// A driver of buse-go becomes a device without a change.
func Example_buse() {
	err := attach(context.Background(), &driver{data: make([]byte, 64<<20)}, func(path string) error {
		return os.WriteFile(path, []byte("as before"), 0)
	})
	if err != nil {
		log.Fatal(err)
	}
}
