package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
)

const disconnectDescription = `
Of several devices those go first that are stored on others of them.

A device that is mounted, held or not ours is refused. With --force it is disconnected all the same: a file
system above loses what it has not written yet, gets an I/O error from every access, and must be
unmounted before the device can be used again.
`

func disconnectCommand() *cli.Command {
	return &cli.Command{
		Name:        "disconnect",
		Usage:       "flush devices, disconnect them and wait until they are gone",
		ArgsUsage:   "DEVICE... | --all",
		Description: strings.TrimSpace(disconnectDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "every device that nbdctl connected"},
			&cli.BoolFlag{Name: "force", Usage: "also a device that is mounted, held or, if named, not ours"},
		},
		OnUsageError: onUsageError,
		Action:       disconnect,
	}
}

func disconnect(c *cli.Context) error {
	if c.Bool("all") == c.Args().Present() {
		return exit.Usagef("disconnect takes either devices (nbd3, /dev/nbd3 or the name given at connect) or --all")
	}
	if slices.Contains(c.Args().Slice(), "") {
		return exit.Usagef(`disconnect "": must be a device or the name given at connect`)
	}
	ctx, stop := interruptible(c)
	defer stop()
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	// All are tried; the first failure gives the exit code.
	return disconnectMany(ctx, c, in.System, stacked(targets(ctx, c, in)))
}

// endPatience bounds the wait for a process whose device has gone already: it
// has nothing left to do but to close its backend.
const endPatience = 10 * time.Second

// disconnectOne takes one device down. Also when that fails, it tells what had
// been lost of the device.
func disconnectOne(ctx context.Context, c *cli.Context, client *nbdnl.Client, d inventory.Device) (loss, err error) {
	if d.Ended() {
		return nil, forget(ctx, c, d)
	}
	force := c.Bool("force")
	if err := allowed(d, force); err != nil {
		return nil, err
	}
	// The process is asked while it is there to tell. The detach hears of what is
	// lost from here on.
	loss = lost(ctx, d)
	if loss != nil && force {
		warn(c, []string{loss.Error()}) // as all that forcing costs
		loss = nil
	}
	unwritten, err := takeDown(ctx, c, client, d)
	if loss == nil {
		loss = unwritten // Else it is the same, in less detail.
	}
	return loss, err
}

// forget takes a device off the list that has ended by itself.
func forget(ctx context.Context, c *cli.Context, d inventory.Device) error {
	if err := privileged("disconnect"); err != nil {
		return err
	}
	if err := d.Entry.Wait(ctx); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "nbd%d disconnected\n", d.Index)
	return err
}

// lost tells which writes to the device have failed. Only the kernel knows whether
// those who made them have been told. A process that does not answer, or is too
// old to know, is no obstacle.
func lost(ctx context.Context, d inventory.Device) error {
	if d.Entry == nil || !d.Entry.Alive || d.Stopped {
		return nil
	}
	loss, err := d.Entry.Loss(ctx)
	if err != nil || loss == "" {
		return nil
	}
	return fmt.Errorf("nbd%d: writes have failed, of which those who made them may not know: %s", d.Index, loss)
}

// takeDown detaches the device and waits for the process that served it. loss is
// what was cached of the device and could not be written before the device went.
func takeDown(ctx context.Context, c *cli.Context, client *nbdnl.Client, d inventory.Device) (loss, err error) {
	free, err := detach(ctx, c, client, d)
	if free {
		loss, err = err, nil
	}
	var busy *nbdnl.BusyError
	if errors.As(err, &busy) {
		if errors.Is(err, nbdnl.ErrNotWritten) { // of which the kernel tells once
			loss = fmt.Errorf("nbd%d: %w", d.Index, nbdnl.ErrNotWritten)
		}
		if busy.Disconnected && d.Stopped { // The process has it open, and cannot close it.
			return loss, fmt.Errorf("%w; %s; nbdctl kick nbd%d frees it", busy, stoppedServer(d.Entry.PID), d.Index)
		}
		return loss, fmt.Errorf("%w; unmount or close it, or use --force", busy)
	}
	if err != nil || !free {
		return nil, err // or a warning has said so; the process stays as long as its device
	}
	if d.Entry != nil {
		late := fmt.Errorf("not within %s; it may be stopped, or stuck in its backend", endPatience)
		ctx, cancel := context.WithTimeoutCause(ctx, endPatience, late)
		defer cancel()
		if err := d.Entry.Wait(ctx); err != nil {
			return loss, fmt.Errorf("nbd%d is disconnected, but %w", d.Index, err)
		}
	}
	_, err = fmt.Fprintf(c.App.Writer, "nbd%d disconnected\n", d.Index)
	return loss, err
}

// detach takes the device away and tells whether its index is free. The index may
// be free although not all could be written that was cached. What --force cost is
// a warning: it was asked for.
func detach(ctx context.Context, c *cli.Context, client *nbdnl.Client, d inventory.Device) (free bool, err error) {
	force := c.Bool("force")
	err = client.Detach(ctx, d.Index, nbdnl.DetachOptions{
		Identifier:  d.Identifier,
		Any:         !d.HasIdentifier,
		Incarnation: d.Incarnation,
		Server:      d.Server(),
		Force:       force,
		// No server is left to write anything to. That is no reason to keep the
		// device; its users are.
		Dead: d.Unserved(),
	})
	if err == nil || !force && !errors.Is(err, nbdnl.ErrNotWritten) {
		return err == nil, err
	}
	var busy *nbdnl.BusyError
	if errors.As(err, &busy) && busy.Disconnected && force {
		warn(c, []string{err.Error()})
		return false, nil
	}
	now, statusErr := client.Status(ctx, d.Index)
	if statusErr != nil || now.Connected() && now.OwnerTID == d.OwnerTID && now.Identifier == d.Identifier {
		return false, err
	}
	if !force {
		return true, err
	}
	warn(c, []string{err.Error()})
	return true, nil
}

// allowed refuses, in this order, a device that is not connected, one that is
// not ours, and a user who may not.
func allowed(d inventory.Device, force bool) error {
	if !d.Connected() {
		return d.NotConnected()
	}
	if d.Left && !force {
		return exit.With(exit.Permission,
			"nbd%d is not ours: a program that has ended connected it, and may take it back when it runs again; "+
				"use --force to disconnect it here", d.Index)
	}
	if !d.Ours() && !force {
		return exit.With(exit.Permission, "nbd%d is not ours: %s connected it; disconnect it there, or use --force",
			d.Index, d.Connector())
	}
	return privileged("disconnect")
}
