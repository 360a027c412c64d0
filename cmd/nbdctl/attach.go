package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
)

const attachDescription = `
The process that served the device has died, and what is asked of the device waits, for its dead timeout; one that the
kernel has connected to a server itself goes on, until a connection is lost. A new process goes on, with the backend
that the device had: the one that its record names, or the one that is named here, as where an image has been moved.
Any other is refused, and the device still waits for the right one.

What was in flight at the death is done again when the timeout of each request is up. What was in memory alone is
lost with the process, so memory is not attached.
`

// attachPatience bounds an attach, of which opening the backend may take the most.
const attachPatience = 2 * time.Minute

func attachCommand() *cli.Command {
	return &cli.Command{
		Name:        "attach",
		Usage:       "serve a device again whose process has died",
		ArgsUsage:   "DEVICE [KIND [ARG]]",
		Description: strings.TrimSpace(attachDescription),
		Flags: []cli.Flag{
			&cli.StringSliceFlag{
				Name:    "option",
				Aliases: []string{"o"},
				Usage:   "an option of the backend, `KEY=VALUE`, in place of all that connect had; may be repeated",
			},
		},
		OnUsageError: onUsageError,
		Action:       attach,
	}
}

func attach(c *cli.Context) error {
	if !c.Args().Present() {
		return exit.Usagef("attach takes a device (nbd3, /dev/nbd3 or the name given at connect)")
	}
	ctx, stop := interruptible(c)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, attachPatience, fmt.Errorf("not within %s", attachPatience))
	defer cancel()
	d, err := ownDevice(ctx, "attach", c.Args().First())
	if err == nil {
		err = attachable(d)
	}
	if err != nil {
		return err
	}
	spec, err := attachSpec(c, d.Entry.Spec)
	if err != nil {
		return err
	}
	r, warnings, err := d.Entry.Attach(ctx, spec, imageDescriptor(spec))
	warn(c, warnings)
	if err != nil {
		return fmt.Errorf("nbd%d was not attached: %w", d.Index, err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "nbd%d attached: pid %d serves it in the place of pid %d\n",
		d.Index, r.PID, d.Entry.PID)
	return err
}

// attachable refuses a device that nobody can go on with.
func attachable(d inventory.Device) error {
	switch {
	case !d.Connected():
		return d.NotConnected()
	case d.Entry != nil && d.Entry.GaveUp != nil && !d.View().Attachable:
		return exit.With(exit.NotFound, "nbd%d has ended, though somebody holds it: %s", d.Index, d.Entry.GaveUp.Reason)
	case d.Entry == nil:
		return fmt.Errorf("nbd%d: its record has been lost or can't be read, so nobody knows which backend is "+
			"the right one; nbdctl disconnect nbd%[1]d frees it", d.Index)
	case d.Entry.Alive:
		return exit.With(exit.Busy, "nbd%d is served by pid %d; nbdctl upgrade replaces that", d.Index, d.Entry.PID)
	case d.Entry.Keeper != nil:
		return exit.With(exit.Busy, "nbd%d: pid %d has another process serve it in this moment", d.Index,
			d.Entry.Keeper.PID)
	case d.View().Attachable:
		return nil
	case kind.Forgets(d.Entry.Spec.Kind):
		return exit.With(exit.Failure, "nbd%d: what was in memory is lost with pid %d, which has ended; "+
			"nbdctl disconnect nbd%[1]d frees it", d.Index, d.Entry.PID)
	case d.Entry.Identity == "":
		return exit.With(exit.Unsupported, "nbd%d: an older nbdctl has connected it, which did not note what the "+
			"right backend is; nbdctl disconnect nbd%[1]d frees it", d.Index)
	}
	return exit.With(exit.Unsupported, "nbd%d: a device by ioctls ends with the process that has connected it; "+
		"nbdctl disconnect nbd%[1]d frees it", d.Index)
}

// attachSpec is what is to be served, of a device that had the spec s.
func attachSpec(c *cli.Context, s host.Spec) (host.Spec, error) {
	args := c.Args().Slice()[1:]
	switch {
	case len(args) == 0 && !c.IsSet("option"):
		return kind.ReadSecrets(s)
	case len(args) > 0:
		was := s.Kind
		if err := readBackend("attach", args, &s); err != nil {
			return s, err
		}
		if s.Kind != was {
			return s, exit.Usagef("%s: the device had a backend of the kind %s", s.Kind, was)
		}
	}
	if c.IsSet("option") {
		s.Options = c.StringSlice("option")
	}
	if err := kind.Check(s); err != nil {
		return s, err
	}
	s, err := absolute(s)
	if err == nil {
		err = checkDescriptor("attach", s)
	}
	if err != nil {
		return s, err
	}
	return kind.ReadSecrets(s)
}
