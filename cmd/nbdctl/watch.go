package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/inventory"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

const watchDescription = `
First comes a line for each device that is connected already (present), then one for each event: connect,
disconnect, link-dead (a connection of the device has died), resize, and state, which is any other change.
What happens after the first lines is not missed, but for what is undone within milliseconds. Other network namespaces than the first see no link-dead.
`

func watchCommand() *cli.Command {
	return &cli.Command{
		Name:        "watch",
		Usage:       "print what happens to devices, also those of other programs, until interrupted",
		Description: strings.TrimSpace(watchDescription),
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object a line"},
		},
		OnUsageError: onUsageError,
		Action:       watch,
	}
}

func watch(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	ctx, stop := interruptible(c)
	defer stop()
	in, err := inventory.Open()
	if err != nil {
		return err
	}
	return in.Watch(ctx, printEvent(c.App.Writer, c.Bool("json")))
}

// printEvent returns what prints a line for each event.
func printEvent(w io.Writer, asJSON bool) func(inventory.Event) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		return func(v inventory.Event) error { return e.Encode(v) }
	}
	return func(v inventory.Event) error {
		_, err := fmt.Fprintf(w, "%s  %-10s  %-6s  %-13s  %s  %s\n",
			v.Time.Local().Format("15:04:05.000"), v.Event, v.Name,
			shownState(v.View), quantity.FormatSize(v.Size), printable(v.Backend))
		return err
	}
}
