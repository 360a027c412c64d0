package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/nbdnl"
)

func listCommand() *cli.Command {
	return &cli.Command{
		Name:  "list",
		Usage: "list the connected devices, also those of other programs",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "also those that are idle or merely held open"},
			&cli.BoolFlag{Name: "json", Usage: "print a JSON array"},
		},
		OnUsageError: onUsageError,
		Action:       list,
	}
}

func list(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	ctx, stop := interruptible(c)
	defer stop()
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	devices, _, err := in.Connected()
	if c.Bool("all") {
		devices, _, err = in.All(ctx)
	}
	if err != nil && devices == nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(c.App.ErrWriter, "nbdctl: warning: %v\n", err)
	}
	views := []inventory.View{}
	for _, d := range devices {
		if d.Connected() || d.Ended() || c.Bool("all") {
			views = append(views, d.View())
		}
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, views)
	}
	if err := printTable(c.App.Writer, views); err != nil {
		return err
	}
	for _, v := range views {
		if v.State == nbdnl.StateOrphaned.String() {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: %s is orphaned: %s\n", v.Name, orphanAdvice(v))
		}
		if v.State == inventory.StateEnded {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: %s has ended: %s\n", v.Name, endedAdvice(v))
		}
		if v.Remote != nil && v.Remote.Error != nil {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: %s\n", remoteNote(v))
		}
		if v.Loss != nil {
			fmt.Fprintf(c.App.ErrWriter, "nbdctl: writes to %s were lost, the first %s\n", v.Name, lossNote(v.Loss))
		}
	}
	return nil
}
