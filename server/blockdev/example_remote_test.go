package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// The kernel speaks with another server itself, and what it loses is replaced.
func ExampleConnectRemote() {
	attach := func(ctx context.Context, use func(path string) error) error {
		export, err := nbd.DialDirect(ctx, "nbd://storage.example.com/vm1", nbd.Options{})
		if err != nil {
			return err
		}
		defer export.Close()
		dev, err := blockdev.ConnectRemote(ctx, export, blockdev.Options{DeadTimeout: time.Minute})
		if err != nil {
			return err
		}
		for o := dev.Outage(); o.Alive == 0; o = dev.Outage() {
			fmt.Println("away since", o.Since, "because of", o.Err)
			<-dev.Changes()
		}
		return errors.Join(use(dev.Path()), dev.Close())
	}
	_ = attach
}
