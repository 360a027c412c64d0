package buse_test

import (
	"fmt"
	"log"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/buse"
)

// A ramDisk is a driver as one has it from a program with buse-go. Nothing of it changes.
type ramDisk struct{ data []byte }

func (d *ramDisk) ReadAt(p []byte, off uint) error {
	copy(p, d.data[off:])
	return nil
}

func (d *ramDisk) WriteAt(p []byte, off uint) error {
	copy(d.data[off:], p)
	return nil
}

func (d *ramDisk) Flush() error                { return nil }
func (d *ramDisk) Trim(off, length uint) error { return nil }
func (d *ramDisk) Disconnect()                 { fmt.Println("disconnected") }

// A driver becomes a backend in one call. Whatever takes a backend takes it then:
// blockdev.Connect, which makes it a block device of the kernel, and server.NewExport.
func Example() {
	const size = 1 << 20
	disk, err := buse.New(&ramDisk{data: make([]byte, size)}, size)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(disk.Size(), "bytes:", backends.Probe(disk).Caps)
	if err := disk.Close(); err != nil { // After the device was closed, if there is one.
		log.Fatal(err)
	}
	// Output:
	// 1048576 bytes: write,sync,trim
	// disconnected
}
