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
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
)

const upgradeDescription = `
A new process, of the nbdctl that is installed, takes each device over from the one that serves it, which ends.
Requests wait for that moment, and none fails: file systems stay mounted, the backend stays open and locked. If
anything goes wrong, the process that was there goes on as if nothing had been.
`

// upgradePatience bounds the upgrade of one device, requests in flight included.
const upgradePatience = 2 * time.Minute

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name:        "upgrade",
		Usage:       "have this nbdctl serve devices in the place of the one that does",
		ArgsUsage:   "DEVICE... | --all | --server PATH",
		Description: strings.TrimSpace(upgradeDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "every device that nbdctl serves"},
			&cli.StringFlag{Name: "server", Usage: "the server of nbdctl serve --control `PATH`, in place of devices"},
		},
		OnUsageError: onUsageError,
		Action:       upgrade,
	}
}

func upgrade(c *cli.Context) error {
	if c.IsSet("server") {
		return upgradeServer(c)
	}
	if c.Bool("all") == c.Args().Present() {
		return exit.Usagef("upgrade takes either devices (nbd3, /dev/nbd3 or the name given at connect) or --all")
	}
	ctx, stop := interruptible(c)
	defer stop()
	devices, err := upgradable(ctx, c)
	errs := []error{err}
	for _, d := range devices {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		errs = append(errs, upgradeOne(ctx, c, d))
	}
	return errors.Join(errs...)
}

// upgradeServer has a server of NBD clients replaced.
func upgradeServer(c *cli.Context) error {
	if c.Bool("all") || c.Args().Present() {
		return exit.Usagef("upgrade --server takes no devices, and not --all")
	}
	ctx, stop := interruptible(c)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, upgradePatience, fmt.Errorf("not within %s", upgradePatience))
	defer cancel()
	path := c.String("server")
	pid, err := host.UpgradeServer(ctx, path)
	if err != nil {
		return fmt.Errorf("the server at %s was not upgraded: %w", path, err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "server at %s upgraded: pid %d serves\n", path, pid)
	return err
}

// upgradable finds the devices that are meant, each once. Those that there are come with the error
// about the others.
func upgradable(ctx context.Context, c *cli.Context) (devices []inventory.Device, err error) {
	var errs []error
	if !c.Bool("all") {
		for _, name := range c.Args().Slice() {
			d, err := served(ctx, "upgrade", name)
			same := func(o inventory.Device) bool { return o.Index == d.Index }
			if err == nil && !slices.ContainsFunc(devices, same) {
				devices = append(devices, d)
			}
			errs = append(errs, err)
		}
		return devices, errors.Join(errs...)
	}
	if err := privileged("upgrade"); err != nil {
		return nil, err
	}
	in, err := inventory.Open()
	if err != nil {
		return nil, err
	}
	all, _, err := in.Connected()
	for _, d := range all {
		if d.Connected() && d.Entry != nil && (d.Entry.Alive || d.Entry.Keeper != nil) {
			devices = append(devices, d)
		}
	}
	return devices, err
}

func upgradeOne(ctx context.Context, c *cli.Context, d inventory.Device) error {
	ctx, cancel := context.WithTimeoutCause(ctx, upgradePatience, fmt.Errorf("not within %s", upgradePatience))
	defer cancel()
	r, warnings, err := d.Entry.Upgrade(ctx)
	warn(c, warnings)
	if err != nil {
		return fmt.Errorf("nbd%d was not upgraded: %w", d.Index, err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "nbd%d upgraded: pid %d serves it in the place of pid %d\n",
		d.Index, r.PID, d.Entry.PID)
	return err
}
