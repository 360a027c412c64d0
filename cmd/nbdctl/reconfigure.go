package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

func reconfigureCommand() *cli.Command {
	return &cli.Command{
		Name:        "reconfigure",
		Usage:       "change the timeouts of a live device",
		ArgsUsage:   "DEVICE",
		Description: "They hold for the requests that come from then on. For the size see nbdctl resize.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "timeout", Usage: "fail a request that takes longer, 1s to 24h, whole seconds"},
			&cli.StringFlag{
				Name:  "dead-timeout",
				Usage: "hold requests for so long after all connections died, 0s to 24h",
			},
			&cli.BoolFlag{Name: "json", Usage: "print the device as JSON, as status --json does"},
		},
		OnUsageError: onUsageError,
		Action:       reconfigure,
	}
}

func reconfigure(c *cli.Context) error {
	if c.NArg() != 1 {
		return exit.Usagef("reconfigure takes one device: nbd3, /dev/nbd3 or the name given at connect")
	}
	var change host.Change
	for _, f := range []struct {
		name  string
		least time.Duration
		value **time.Duration
	}{{"timeout", time.Second, &change.Timeout}, {"dead-timeout", 0, &change.DeadTimeout}} {
		if !c.IsSet(f.name) {
			continue
		}
		d, err := readSeconds(c, f.name, f.least)
		if err != nil {
			return err
		}
		*f.value = &d
	}
	if change.Timeout == nil && change.DeadTimeout == nil {
		return exit.Usagef("reconfigure needs --timeout or --dead-timeout")
	}
	changeOf := func(*host.Entry) (host.Change, error) { return change, nil }
	say := func(s *host.Status) string {
		spec := s.Record.Spec
		return fmt.Sprintf("%s has timeout %s, dead timeout %s", s.Record.Device(),
			quantity.FormatSeconds(spec.Timeout), quantity.FormatSeconds(spec.DeadTimeout))
	}
	return changeDevice(c, c.Args().First(), changeOf, say)
}
