// Command handover serves an image as a block device that outlives its process. Run again, handover
// IMAGE SOCKET takes the device over from the process that runs, which ends; or goes on with what
// one has left that was killed. Who uses the device merely waits. Each prints the device's path
// when it serves it.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "handover:", err)
		os.Exit(1)
	}
}

const name = "handover-example"

func run(ctx context.Context, image, socket string) error {
	pool, err := blockdev.NewPool(blockdev.PoolOptions{Name: name})
	if err != nil {
		return err
	}
	defer pool.Close()
	dev, f, err := device(ctx, pool, image, socket)
	if err != nil {
		return err
	}
	defer dev.Close()
	_ = os.Remove(socket) // Who has listened there does not any more.
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	fmt.Println(dev.Path())
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return dev.Disconnect(context.WithoutCancel(ctx))
		}
		if err != nil {
			return err
		}
		// The open file goes along, and with it the lock on the image. What is in the page cache
		// the successor finds there.
		o := blockdev.HandOverOptions{Unsynced: true, Files: []*os.File{f}}
		err = dev.HandOverTo(ctx, c.(*net.UnixConn), o)
		c.Close()
		if err == nil || errors.Is(err, blockdev.ErrHandedOver) {
			return err
		}
		fmt.Fprintln(os.Stderr, "handover:", err) // It is served here.
	}
}

// device takes the device over from the process that listens, or else goes on with what one has
// left, or else connects a new one.
func device(ctx context.Context, p *blockdev.Pool, image, socket string) (*blockdev.Device, *os.File, error) {
	if c, err := net.Dial("unix", socket); err == nil {
		defer c.Close()
		return takeOver(ctx, c.(*net.UnixConn))
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	disk, err := file.New(f, file.Options{}) // It is locked as long as somebody serves it.
	if err != nil {
		return nil, nil, err
	}
	o := blockdev.Options{
		Identifier: name + ":" + image, Connections: 2, Timeout: 5 * time.Second, DeadTimeout: time.Minute,
	}
	left, err := p.Left(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range left {
		if s.Identifier == o.Identifier {
			dev, err := p.Attach(ctx, s, disk, o)
			return dev, f, err
		}
	}
	dev, err := p.Connect(ctx, disk, o)
	return dev, f, err
}

func takeOver(ctx context.Context, c *net.UnixConn) (dev *blockdev.Device, f *os.File, err error) {
	dev, err = blockdev.TakeOver(ctx, c,
		func(_ context.Context, _ *blockdev.Document, files []*os.File) (backends.Backend, error) {
			f = files[0]
			return file.New(f, file.Options{})
		}, blockdev.Options{})
	return dev, f, err
}
