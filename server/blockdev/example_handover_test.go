package blockdev_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A process hands a device in memory over to its successor, which is at the other end of a Unix
// socket, together with the memory. What is asked of the device meanwhile waits.
func ExampleDevice_HandOverTo() {
	handOver := func(ctx context.Context, successor *net.UnixConn, dev *blockdev.Device, disk *memory.Memory) error {
		files, err := disk.Files()
		if err != nil {
			return err
		}
		for _, f := range files {
			defer f.Close()
		}
		err = dev.HandOverTo(ctx, successor, blockdev.HandOverOptions{
			Unsynced: true, // The successor finds all of it in the memory.
			Note:     json.RawMessage(`{"kind": "memory"}`),
			Files:    files,
		})
		if err != nil {
			return err // The device is served here, as before.
		}
		return disk.Leave()
	}
	_ = handOver
	// Output:
}

// The successor checks that the device is what it is said to be, and goes on with it.
func ExampleTakeOver() {
	takeOver := func(ctx context.Context, predecessor *net.UnixConn) (*blockdev.Device, error) {
		open := func(_ context.Context, doc *blockdev.Document, files []*os.File) (backends.Backend, error) {
			var note struct{ Kind string }
			if err := json.Unmarshal(doc.Note, &note); err != nil || note.Kind != "memory" {
				return nil, fmt.Errorf("a backend %q is not known: %v", note.Kind, err)
			}
			return memory.Inherit(doc.Size, files, memory.Options{})
		}
		return blockdev.TakeOver(ctx, predecessor, open, blockdev.Options{})
	}
	_ = takeOver
	// Output:
}

// A successor that does not know what comes is ready for devices of both kinds.
func ExampleTakeOverEither() {
	takeOver := func(ctx context.Context, predecessor *net.UnixConn) (dev *blockdev.Device, err error) {
		open := func(_ context.Context, doc *blockdev.Document, files []*os.File) (backends.Backend, error) {
			return memory.Inherit(doc.Size, files, memory.Options{})
		}
		var export *nbd.Direct
		remote := func(ctx context.Context, doc *blockdev.Document, _ []*os.File) (blockdev.Remote, error) {
			var note struct{ URI string }
			if err := json.Unmarshal(doc.Note, &note); err != nil {
				return nil, err
			}
			export, err = nbd.DialDirect(ctx, note.URI, nbd.Options{Connections: len(doc.Connections)})
			return export, err
		}
		dev, err = blockdev.TakeOverEither(ctx, predecessor, open, remote, blockdev.Options{})
		if err != nil && export != nil {
			err = errors.Join(err, export.Close())
		}
		return dev, err
	}
	_ = takeOver
	// Output:
}

// Where the two processes do not share a socket, as with a supervisor that keeps descriptors, they
// pass the document and the descriptors themselves.
func ExampleAdopt() {
	ctx := context.Background()
	// pass gives a document and descriptors to another process, and returns when that has the
	// device, or why not.
	handOver := func(dev *blockdev.Device, pass func(document []byte, files []*os.File) error) error {
		h, err := dev.HandOver(ctx, blockdev.HandOverOptions{})
		if err != nil {
			return err
		}
		document, err := json.Marshal(h.Document)
		if err == nil {
			err = pass(document, h.Files)
		}
		if err != nil {
			h.Resume() // Nothing has happened.
			return err
		}
		return h.Complete()
	}
	// begin returns when the other process has let go of the device.
	adopt := func(document []byte, files []*os.File, b backends.Backend, begin func() error) (*blockdev.Device, error) {
		var doc blockdev.Document
		if err := json.Unmarshal(document, &doc); err != nil {
			return nil, err
		}
		return blockdev.Adopt(ctx, doc, files, b, blockdev.Options{}, begin)
	}
	_, _ = handOver, adopt
	// Output:
}

// A program that was killed goes on with its device when it runs again. Who uses that has merely
// waited.
func ExamplePool_Attach() {
	attach := func(ctx context.Context, pool *blockdev.Pool, disk backends.Backend, identifier string) (
		*blockdev.Device, error,
	) {
		left, err := pool.Left(ctx)
		for _, s := range left {
			if s.Identifier == identifier { // as it was given in Options.Identifier
				return pool.Attach(ctx, s, disk, blockdev.Options{DeadTimeout: 60e9})
			}
		}
		return nil, err
	}
	_ = attach
	// Output:
}
