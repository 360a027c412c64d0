package main

import (
	"context"
	"fmt"
	"math"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

const resizeDescription = `
SIZE is 20G, or +5G or -512M for so much more or less. A file system above does not follow by itself: after
growing run resize2fs or xfs_growfs; before shrinking make it smaller first, for what lies beyond the new
end is lost. A device that is mounted or held is not made shorter, except with --force.
`

func resizeCommand() *cli.Command {
	return &cli.Command{
		Name:        "resize",
		Usage:       "make a device and its backing object longer or shorter, while in use",
		ArgsUsage:   "DEVICE SIZE",
		Description: strings.TrimSpace(resizeDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "make it shorter although it is mounted or held"},
			&cli.BoolFlag{Name: "json", Usage: "print the device as JSON, as status --json does"},
		},
		OnUsageError: onUsageError,
		Action:       resize,
	}
}

func resize(c *cli.Context) error {
	if c.NArg() != 2 {
		return exit.Usagef("resize takes a device and a size: nbdctl resize nbd3 20G")
	}
	name, size := c.Args().Get(0), c.Args().Get(1)
	parse, err := sizeArgument(name, size)
	if err != nil {
		return err
	}
	changeOf := func(e *host.Entry) (host.Change, error) {
		n, err := parse(e.Size)
		switch {
		case err != nil:
			return host.Change{}, exit.Usagef("resize %s %s: %w", name, size, err)
		case n <= 0:
			return host.Change{}, exit.Usagef("resize %s %s: nothing would be left of %s",
				name, size, quantity.FormatSize(e.Size))
		case e.BlockSize > 0 && n%int64(e.BlockSize) != 0: // A record may have no block size.
			return host.Change{}, exit.Usagef("resize %s %s: %d bytes are not a multiple of the block size %d",
				name, size, n, e.BlockSize)
		}
		change := host.Change{Size: &n, Force: c.Bool("force")}
		if strings.HasPrefix(size, "+") || strings.HasPrefix(size, "-") {
			change.From = &e.Size
		}
		return change, nil
	}
	say := func(s *host.Status) string {
		return fmt.Sprintf("%s is %s (%d bytes)", s.Record.Device(), quantity.FormatSize(s.Record.Size), s.Record.Size)
	}
	return changeDevice(c, name, changeOf, say)
}

// sizeArgument reads a size, or a difference to one.
func sizeArgument(name, v string) (func(int64) (int64, error), error) {
	sign, digits := int64(0), v
	if more, ok := strings.CutPrefix(v, "+"); ok {
		sign, digits = 1, more
	} else if less, ok := strings.CutPrefix(v, "-"); ok {
		sign, digits = -1, less
	}
	n, err := quantity.ParseSize(digits)
	if err != nil {
		return nil, exit.Usagef("resize %s %s: %w", name, v, err)
	}
	return func(was int64) (int64, error) {
		switch {
		case sign == 0:
			return n, nil
		case sign > 0 && n > math.MaxInt64-was:
			return 0, fmt.Errorf("%s and as much more: %w", quantity.FormatSize(was), quantity.ErrTooLarge)
		}
		return was + sign*n, nil
	}, nil
}

// changeDevice has the process that serves the device called name change it,
// and says what came of it.
func changeDevice(
	c *cli.Context,
	name string,
	changeOf func(*host.Entry) (host.Change, error),
	say func(*host.Status) string,
) error {
	ctx, stop := interruptible(c)
	defer stop()
	d, err := served(ctx, c.Command.Name, name)
	if err != nil {
		return err
	}
	change, err := changeOf(d.Entry)
	if err != nil {
		return err
	}
	s, err := d.Entry.Change(ctx, change)
	if err != nil {
		return err
	}
	if !c.Bool("json") {
		_, err := fmt.Fprintln(c.App.Writer, say(s))
		return err
	}
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	v, err := in.Full(ctx, d.Index)
	if err != nil {
		return err
	}
	return printJSON(c.App.Writer, v)
}

// served finds a device that a living process of ours serves, and its record, for a command that
// asks that process to do something.
func served(ctx context.Context, command, name string) (inventory.Device, error) {
	d, err := ownDevice(ctx, command, name)
	switch {
	case err != nil:
	case d.Entry == nil:
		err = fmt.Errorf("nbd%d: its record has been lost or can't be read, so its process can't be asked", d.Index)
	case !d.Entry.Alive && d.Entry.Keeper == nil: // Else the next process answers.
		err = fmt.Errorf("nbd%d is orphaned: pid %d, which served it, has ended; nbdctl disconnect nbd%[1]d frees it",
			d.Index, d.Entry.PID)
	}
	return d, err
}

// ownDevice finds a connected device that is ours, for a user who may change it.
func ownDevice(ctx context.Context, command, name string) (inventory.Device, error) {
	in, err := inventory.Open()
	if err != nil {
		return inventory.Device{}, err
	}
	d, err := in.Lookup(ctx, name)
	switch {
	case err != nil:
		return d, err
	case !d.Connected():
		return d, d.NotConnected()
	case !d.Ours():
		return d, exit.With(exit.Permission, "%s: nbd%d is not ours: %s connected it", command, d.Index, d.Connector())
	}
	return d, privileged(command)
}
