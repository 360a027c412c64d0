package nbdnl_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// A connection that was made elsewhere, its handshake done, becomes a block device.
func ExampleClient_Connect() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := attach(ctx, dialExport()); err != nil {
		log.Fatal(err)
	}
}

// One look at all processes tells who uses any of the connected devices.
func ExampleClient_Holders() {
	client, err := nbdnl.New()
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	devices, err := client.Connected()
	if err != nil {
		log.Fatal(err)
	}
	var indexes []int
	for _, d := range devices {
		indexes = append(indexes, d.Index)
	}
	holders, err := client.Holders().FindAll(context.Background(), indexes...)
	if err != nil {
		log.Print(err) // A device that has gone meanwhile; the others are there.
	}
	for index, users := range holders {
		fmt.Println(nbdnl.Path(index), users)
	}
}

// attach makes a device of a connection to an export of 1 MiB, and detaches it again.
func attach(ctx context.Context, conn *net.UnixConn) error {
	client, err := nbdnl.New()
	if err != nil {
		return err
	}
	defer client.Close()

	id := nbdnl.NewIdentifier("example")
	index, err := client.Connect(ctx, nbdnl.Config{
		Sockets:    []syscall.Conn{conn},
		Size:       1 << 20,
		BlockSize:  512,
		Flags:      nbdnl.FlagSendFlush,
		Timeout:    30 * time.Second,
		Identifier: id,
	})
	if err != nil {
		return err
	}
	fmt.Println("ready:", nbdnl.Path(index))
	return client.Detach(ctx, index, nbdnl.DetachOptions{Identifier: id})
}

// dialExport stands for whatever makes the connection and negotiates.
func dialExport() *net.UnixConn { return new(net.UnixConn) }

// A program that shows what happens to the devices of the machine.
func ExampleClient_Watch() {
	client, err := nbdnl.New()
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	watch, err := client.Watch(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer watch.Close()
	for _, d := range watch.Devices() {
		fmt.Println(nbdnl.Path(d.Index), "is", d.State)
	}
	for {
		e, err := watch.Next()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.Time.Format(time.TimeOnly), nbdnl.Path(e.Index), e.Kind)
	}
}
