package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

const kickDescription = `
Programs that wait for the device get an I/O error within seconds, whatever is stuck: the backend, the serving
process, or the kernel in a disconnect of it. What was not written yet is lost, and the device has ended; a file
system above must be unmounted. Where nothing is stuck, use nbdctl disconnect.
`

func kickCommand() *cli.Command {
	return &cli.Command{
		Name:         "kick",
		Usage:        "end a device whose I/O is stuck",
		ArgsUsage:    "DEVICE",
		Description:  strings.TrimSpace(kickDescription),
		OnUsageError: onUsageError,
		Action:       kick,
	}
}

const (
	// kickPatience bounds the wait for a process that may itself be stuck.
	kickPatience = 3 * time.Second
	// freePatience bounds the waits for what follows once nothing is stuck.
	freePatience = 10 * time.Second
)

func kick(c *cli.Context) error {
	if c.NArg() != 1 {
		return exit.Usagef("kick takes one device: nbd3, /dev/nbd3 or the name given at connect")
	}
	name := c.Args().First()
	ctx, stop := interruptible(c)
	defer stop()
	d, err := ownDevice(ctx, "kick", name)
	if err != nil {
		return err
	}
	answered, err := unstick(ctx, d)
	if err != nil {
		return err
	}
	return settle(ctx, c, d, answered)
}

// unstick makes every request of the device fail, and tells whether the
// serving process did so itself.
func unstick(ctx context.Context, d inventory.Device) (answered bool, err error) {
	if d.Entry != nil && d.Entry.Alive {
		asked, cancel := context.WithTimeout(ctx, kickPatience)
		defer cancel()
		err := d.Entry.Kick(asked)
		if err == nil {
			return true, nil
		}
		// It is stopped or stuck. Without its connections the kernel can't be
		// kept waiting by it.
		if cutErr := d.Entry.Cut(); cutErr != nil {
			return false, errors.Join(err, cutErr)
		}
	}
	client, err := nbdnl.New()
	if err != nil {
		return false, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, freePatience)
	defer cancel()
	switch {
	case d.HasIdentifier:
		err = client.Drop(ctx, d.Index, d.Identifier)
	case d.Incarnation != nbdnl.IncarnationOf(d.Index):
		err = nbdnl.ErrNotConnected // any more, and another program may have the index
	default:
		err = client.DropAny(ctx, d.Index)
	}
	if errors.Is(err, nbdnl.ErrNotConnected) {
		err = nil
	}
	if err != nil && ctx.Err() != nil && d.Entry != nil {
		// A disconnect of another device, on which we have no hold, is stuck.
		spec := d.Entry.Spec
		err = fmt.Errorf("nbd%d: its connections were cut, so that its requests fail when they are %s old, "+
			"but it could not be disconnected: %w",
			d.Index, quantity.FormatSeconds(spec.Timeout+spec.DeadTimeout), err)
	}
	return false, err
}

// settle waits for what follows, and says what stays. A process that did not
// answer is killed; one that did ends when its backend lets it.
func settle(ctx context.Context, c *cli.Context, d inventory.Device, answered bool) error {
	client, err := nbdnl.New()
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, freePatience, fmt.Errorf("not within %s", freePatience))
	defer cancel()
	if d.Entry != nil && !answered {
		if err := d.Entry.Kill(ctx); err != nil {
			warn(c, []string{fmt.Sprintf("nbd%d is disconnected, but %v", d.Index, err)})
		}
	}
	if err := waitEnd(ctx, client, d); err != nil {
		warn(c, []string{fmt.Sprintf("nbd%d is disconnected, and not free before who uses it lets go: %s",
			d.Index, users(ctx, d.Index))})
	} else if d.Entry != nil && answered {
		ctx, cancel := context.WithTimeoutCause(ctx, kickPatience, fmt.Errorf("not within %s", kickPatience))
		defer cancel()
		if err := d.Entry.Wait(ctx); err != nil {
			warn(c, []string{fmt.Sprintf("nbd%d is disconnected, but %v; it ends when its backend lets it",
				d.Index, err)})
		}
	}
	_, err = fmt.Fprintf(c.App.Writer, "nbd%d kicked\n", d.Index)
	return err
}

// waitEnd waits until the index is free, or another program's.
func waitEnd(ctx context.Context, client *nbdnl.Client, d inventory.Device) error {
	if now := nbdnl.IncarnationOf(d.Index); !d.HasIdentifier && now != 0 && now != d.Incarnation {
		return nil
	}
	return client.WaitFree(ctx, d.Index)
}

// users names who holds the device, as far as can be told.
func users(ctx context.Context, index int) string {
	holders, err := holder.Find(ctx, index)
	if err != nil || len(holders) == 0 {
		return "somebody who can't be seen from here"
	}
	var names []string
	for _, h := range holders {
		names = append(names, h.String())
	}
	return strings.Join(names, ", ")
}
